"""What a build does before an expert is published: validate it, print verdicts, and fail if a check failed.

Two experts are looked at: a healthy one, and a copy of it with a broken weight. The script ends with the exit code that
a build should take from the first; the second shows what a failure looks like.
"""

import shutil
import sys

from languages import RUNS, accuracy, load_model, make_base, make_expert
from safetensors.torch import load_file, save_file

from mergeready.validation import Evaluation, validate
from mergeready.validation.page import write_page

base, expert, peer = make_base(), make_expert("north"), make_expert("south")
evaluation = Evaluation(
    model=load_model(), own=accuracy("north", "test"), others={str(peer): accuracy("south", "test")}
)


def check(folder):
    report = validate(folder, base, peers=[peer], evaluation=evaluation)
    print(f"\n{folder}")
    for verdict in report.verdicts:
        if verdict.status == "failed":
            print(f"  {verdict.id} failed ({verdict.severity}): {verdict.message}\n      fix: {verdict.fix}")
    for status in ("passed", "failed", "not checked"):
        print(f"  {status}: {sum(verdict.status == status for verdict in report.verdicts)}")
    print(f"  {report.headline}\n  exit code {report.exit_code()}")
    return report


broken = RUNS / "broken"
shutil.copytree(expert, broken, dirs_exist_ok=True)
weights = load_file(expert / "model.safetensors")
weights["classifier.weight"][0, 0] = float("nan")
save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
check(broken)

report = check(expert)
write_page(RUNS / "report.html", report)
print(f"\nthe whole report: {RUNS / 'report.html'}")
sys.exit(report.exit_code())
