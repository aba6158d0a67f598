"""Two teams that must not share weights: A sends a small fingerprint, B measures interference with A while training."""

import argparse

import torch
from languages import RUNS, examples, load_model, make_base, make_expert

from mergeready import Base, MergeReadyLoop, Schedule, compare, open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 40 if parser.parse_args().quick else 200
sent = RUNS / "team-a.fingerprint.safetensors"


def team_a():
    """Has an expert, and writes a file that holds no weights: norms, and a sample of what training changed.

    A budget of 2,048 coordinates is for this tiny model; the default is 2**18, half a megabyte.
    """
    base = Base.open(make_base())
    vector = open_expert(make_expert("south"), base).vector
    take_fingerprint(vector, base, label="team-a", budget=2048).save(sent)


def team_b():
    """Has the base and A's fingerprint, nothing else of A."""
    torch.manual_seed(0)
    model, data = load_model(), examples("north", "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = MergeReadyLoop(
        RUNS / "team-b", base=make_base(), peers=[sent], measure=Schedule(every=steps // 4)
    )
    monitor.prepare(model, total_steps=steps)
    for _ in range(steps):
        model(**data[torch.randint(len(data), (16,))]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    monitor.finish()
    model.save_pretrained(RUNS / "team-b-expert")
    return monitor.history


team_a()
history = team_b()
print(f"the fingerprint has {sent.stat().st_size / 1000:.0f} kB")
print("step    norm  cosine with A        sign conflict with A")
for found in history.metrics:
    cosine, conflict = found.cosine.get("team-a"), found.sign_conflict.get("team-a")
    if cosine is not None and conflict is not None:
        errors = found.cosine_error["team-a"], found.sign_conflict_error["team-a"]
        print(
            f"{found.step:4}  {found.norm:6.2f}  {cosine:6.3f} ± {errors[0]:.3f}       "
            f"{conflict:6.3f} ± {errors[1]:.3f}"
        )
exact = compare(make_base(), [RUNS / "team-b-expert", make_expert("south")])
print(f"exact, from both weights: {exact.cosine[0][1]:.3f}, {exact.sign_conflict[0][1]:.3f}")
