"""One merge by this library. Run as a process of its own.

python -m benchmarks.engines.own METHOD PARAMETERS_AS_JSON OUTPUT BASE EXPERT...
"""

import json
import sys

from mergeready.merging import merge_folders

if __name__ == "__main__" and len(sys.argv) > 1:
    method, parameters, output, base, *experts = sys.argv[1:]
    # CPU seconds of two threads that share a core are longer ones, and the other engines have one thread.
    merge_folders(base, experts, output, method, threads=1, **json.loads(parameters))
