"""One merge by mergekit. Run by the Python that has it.

python theirs.py METHOD PARAMETERS_AS_JSON OUTPUT BASE EXPERT...
"""

import json
import sys

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

if __name__ == "__main__" and len(sys.argv) > 1:
    method, parameters, output, base, *experts = sys.argv[1:]
    weighted = {"weight": 1.0, **json.loads(parameters)}
    config = {
        "merge_method": method,
        "models": [{"model": expert, "parameters": weighted} for expert in experts],
        "dtype": "bfloat16",
        **({} if method == "linear" else {"base_model": base}),
    }
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config))),
        output,
        MergeOptions(copy_tokenizer=False, lazy_unpickle=True, write_model_card=False),
    )
