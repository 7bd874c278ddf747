"""
Runs scripts in forks of one interpreter that has torch loaded: a start takes milliseconds, and what runs
sees a fresh process, because nothing is computed before the fork.

As a program it answers requests, lines of JSON: [script, arguments, folder, environment] -> [exit code,
standard output, standard error].
"""
import json
import os
import runpy
import signal
import sys
import tempfile

import numpy  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401


def start(script, arguments, folder, out=None, error=None):
    """ Starts a script in a fork; `out` and `error` are files -> the process's id. """
    if pid := os.fork():
        return pid
    code = 1
    signal.alarm(300)  # what hangs ends
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for number, file in ((1, out), (2, error)):
            os.dup2(file.fileno() if file else 0, number)
        os.chdir(folder)
        sys.argv, sys.path[0] = [script, *map(str, arguments)], os.path.dirname(script)
        runpy.run_path(script, run_name='__main__')
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = {None: 0}.get(stop.code, stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            *request, environment = json.loads(line)
            os.environ.clear()
            os.environ.update(environment)
            pid = start(*request, out, error)
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
            for stream in (out, error):
                stream.seek(0)
                answer.append(stream.read().decode(errors='replace'))
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
