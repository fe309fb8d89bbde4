"""Ranks of a gloo group in processes of their own, which run one function after another."""

import multiprocessing
import os
import pickle
import traceback

import torch
import torch.distributed as dist

WAIT = 60  # seconds; a rank that hangs fails its test


class Ranks:
    """Processes that stay; each is a rank of the group."""

    def __init__(self, world, store):
        context = multiprocessing.get_context("forkserver")
        # once for all ranks: torch, and what its optimisers and collectives import at first use
        context.set_forkserver_preload(["mpsae", "torch._dynamo", "torch.distributed.tensor"])
        self.world, self.pipes, self.processes = world, [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world, str(store)), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *arguments):
        """Call a function of a module on every rank; what each returned or its exception."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(WAIT):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.world} hangs in {function.__name__}")
            found.append(pickle.loads(pipe.recv_bytes()))
        failures = [text for ok, text in found if not ok]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [value for _, value in found]

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(pipe, rank, world, store):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
