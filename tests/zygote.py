"""
Runs scripts in forks of one interpreter that has torch loaded: a start takes milliseconds.

A request is a line of JSON on standard input, [script, arguments, folder]; the answer, [exit code,
standard output, standard error]. What runs sees a fresh process: nothing is computed before the fork.
"""
import json
import os
import runpy
import sys
import tempfile

import numpy  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401


def run(script, arguments, folder, out, error):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(error, 2)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    code = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    script, arguments, folder = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        if not (pid := os.fork()):
            run(script, arguments, folder, out.fileno(), error.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in (out, error):
            stream.seek(0)
            texts.append(stream.read().decode(errors='replace'))
    print(json.dumps([code, *texts]), flush=True)
