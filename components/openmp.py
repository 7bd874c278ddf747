"""
How the threads of a CPU computation wait for each other. Import this before torch, which reads it
as it starts.

By default, libgomp's threads keep their cores busy while they wait. If another program uses a
core, each waits for threads that cannot run, and a step of a small model takes many times as long.
A short wait before a thread sleeps costs an idle machine little.
"""
import os

os.environ.setdefault('GOMP_SPINCOUNT', '1000')
