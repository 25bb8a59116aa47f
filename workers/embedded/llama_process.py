"""One llama.cpp server in a process of its own: `python -m workers.embedded.llama_process`, started by llama.py.

Reads one line of JSON (the parameters) from stdin, loads the model, and writes one line of JSON to stdout:
`{"address": …}`, or `{"error": …}` and exits 1. It ends when stdin does, which is when its parent ends however that
happens; on Linux the kernel kills it with its parent besides.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    wanted = json.loads(sys.stdin.readline())
    try:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = wanted["path"]
        params.n_parallel = wanted["slots"]
        params.n_ctx = wanted["num_ctx"] * wanted["slots"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["threads"]
        params.n_threads_http = wanted["slots"] + 4
        # One process both completes and embeds. A model made for embedding reads its input in one batch.
        params.embedding = True
        if wanted["one_batch"]:
            params.n_batch = params.n_ubatch = wanted["num_ctx"]
        params.ctx_shift = True
        params.cache_ram_mib = 0
        params.fit_params = False
        params.api_keys = [wanted["key"]]
        params.ui = False
        params.verbosity = 1
        server = xllamacpp.Server(params)
    except (ImportError, RuntimeError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps({"address": server.listening_address}), flush=True)
    while sys.stdin.readline():
        pass
    # Nothing is kept on disk and nobody is left to read a running answer: no need to take llama.cpp apart in order.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
