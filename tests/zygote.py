"""
Runs scripts in forks of one interpreter that has torch loaded: a start takes milliseconds, and what runs
sees a fresh process, because nothing is computed before the fork.

As a program it answers requests, lines of JSON: [script, arguments, folder, processes, environment] ->
[exit code, standard output, standard error].
"""
import json
import os
import runpy
import signal
import socket
import sys
import tempfile

import numpy  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401


def start(script, arguments, folder, processes=1, out=None, error=None):
    """ Starts a script in a fork, or in several, as torchrun does; `out`, `error` are files -> their ids. """
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        ids.append(os.fork())
        if not ids[-1]:
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                  LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1',
                                  MASTER_PORT=str(port))
            run(script, arguments, folder, out, error)
    return ids


def wait(ids):
    """ Waits for these processes; where one fails, ends the others -> the first exit code that is not 0. """
    code, left = 0, set(ids)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in left:
                os.kill(other, signal.SIGTERM)
    return code


def run(script, arguments, folder, out, error):
    """ The script, in this process, which ends with it. """
    code = 1
    signal.alarm(300)  # what hangs ends
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for number, file in ((1, out), (2, error)):
            os.dup2(file.fileno() if file else 0, number)
        os.chdir(folder)
        for path in os.environ.get('PYTHONPATH', '').split(os.pathsep):  # as at the start of Python
            if os.path.exists(path := os.path.join(path, 'sitecustomize.py')):
                runpy.run_path(path)
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
            answer = [wait(start(*request, out, error))]
            for stream in (out, error):
                stream.seek(0)
                answer.append(stream.read().decode(errors='replace'))
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
