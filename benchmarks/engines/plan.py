"""The plan of one merge by this library, which opens and checks all inputs. Run as a process of its own.

python -m benchmarks.engines.plan BASE EXPERT...
"""

import sys

from mergeready.merging import merge_plan

if __name__ == "__main__" and len(sys.argv) > 1:
    base, *experts = sys.argv[1:]
    merge_plan(base, experts)
