"""Thousands of requests made up after the server's own OpenAPI document, right ones and wrong ones: no answer may be a
server error, and none may take long.

    uv run --group fuzz python -m benchmarks.soak.schema [MODEL] [--examples 2000] [--seed 1]

Schemathesis makes them up and looks at the answers. The exit status is 1 if something was wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import urllib.request

from benchmarks.soak.streams import serving

HOOKS = "benchmarks.soak.schema_hooks"
TIMEOUT = 120
"""Seconds after which an answer counts as missing."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--examples", type=int, default=2000, help="at least so many, over all operations")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with serving(args.model, 8, ["--max-model-len", "256", "--enable-ui"]) as (url, _):
        with urllib.request.urlopen(url + "/openapi.json") as answer:
            document = json.load(answer)
        # What takes no body has a handful of different requests; the others make up for them.
        with_body = sum(
            "requestBody" in operation for path in document["paths"].values() for operation in path.values()
        )
        command = ["schemathesis", "run", url + "/openapi.json", "--phases", "examples,coverage,fuzzing"]
        command += ["--checks", "not_a_server_error", "--max-examples", str(-(-args.examples // with_body))]
        command += ["--request-timeout", str(TIMEOUT), "--seed", str(args.seed), "--continue-on-failure"]
        return subprocess.run(command, check=False, env={**os.environ, "SCHEMATHESIS_HOOKS": HOOKS}).returncode


if __name__ == "__main__":
    sys.exit(main())
