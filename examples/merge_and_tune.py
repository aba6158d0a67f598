"""Merge two experts by several methods, each with its best scale on validation data, and report on test data.

Scales are tuned by loss, as some twenty validation sentences a task are few; what is printed is accuracy.
"""

import argparse

import torch
from languages import RUNS, TASKS, accuracy, load_model, loss, make_base, make_expert

from mergeready import merge, tune_scale

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer methods")
methods = ["average", "task_arithmetic", "ties"]
if not parser.parse_args().quick:
    methods += ["dare_ties", "tsv_m", "iso_c"]

base, model = make_base(), load_model().eval()
experts = [make_expert(task) for task in TASKS]
validation = {task: loss(task) for task in TASKS}
test = {task: accuracy(task, "test") for task in TASKS}


@torch.no_grad()
def report(name, scale, loaded):
    values = "".join(f"{evaluate(loaded)['accuracy'].mean():8.3f}" for evaluate in test.values())
    print(f"{name:<18}{scale:>6}{values}")


print(f"{'':<18}{'scale':>6}" + "".join(f"{task:>8}" for task in TASKS))
report("base", "", model)
for task, folder in zip(TASKS, experts, strict=True):
    report(f"expert {task}", "", type(model).from_pretrained(folder).eval())
for method in methods:
    found = tune_scale(model, base, experts, validation, method)
    folder = merge(base, experts, method, scale=found.scale, output=RUNS / f"merged-{method}", overwrite=True)
    report(method, f"{found.scale:.2f}", type(model).from_pretrained(folder).eval())
    if not found.inside:
        print(f"  the best scale of {method} may lie beyond {max(found.tried):.2f}")
