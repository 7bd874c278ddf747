"""
Runs scripts in forks of one interpreter that has imported torch: a start takes milliseconds
instead of seconds. A script finds a fresh process, because nothing is computed before the fork.

As a program it answers requests, lines of JSON: [script, arguments, folder, processes,
environment] -> [exit code, standard output, standard error].
"""
import json
import os
import runpy
import signal
import socket
import sys
import tempfile

import numpy  # noqa: F401  imported before the fork, as torch is
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401

TIMEOUT = 300  # seconds


def start(script, arguments, folder, processes, out, error):
    """
    Starts a script in a fork, or in several with the environment variables of torchrun. `out` and
    `error` are open files for its standard output and error.

    Returns the process ids.
    """
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                    LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1',
                    MASTER_PORT=str(port))
            run(script, arguments, folder, out, error)
        pids.append(pid)
    return pids


def wait(pids):
    """
    Waits for these processes. If one fails, the others are ended, as torchrun does.

    Returns the first exit code that is not 0, else 0.
    """
    first_code = 0
    running = set(pids)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status != 0 and first_code == 0:
            first_code = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return first_code


def run(script, arguments, folder, out, error):
    """ Runs a script in this process, which ends with it. """
    signal.alarm(TIMEOUT)  # a script that hangs is ended
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(error.fileno(), 2)
        os.chdir(folder)
        run_sitecustomize()
        sys.argv = [script, *map(str, arguments)]
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = exit_code(stop.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_sitecustomize():
    """ Runs the sitecustomize.py of PYTHONPATH, as Python does when it starts. """
    for folder in os.environ.get('PYTHONPATH', '').split(os.pathsep):
        path = os.path.join(folder, 'sitecustomize.py')
        if os.path.exists(path):
            runpy.run_path(path)


def exit_code(code):
    """ The exit code of sys.exit(code), after printing a message as Python does. """
    if isinstance(code, str):
        # in one write, so that the lines of two processes are not mixed
        sys.stderr.write(f'{code}\n')
        return 1
    return code or 0


def main():
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            script, arguments, folder, processes, environment = json.loads(line)
            os.environ.clear()
            os.environ.update(environment)
            answer = [wait(start(script, arguments, folder, processes, out, error))]
            for stream in (out, error):
                stream.seek(0)
                answer.append(stream.read().decode(errors='replace'))
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
