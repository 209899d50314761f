"""Two processes that share each batch: started once for all methods, and restarted after one that did not finish."""

from __future__ import annotations

import hashlib
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import torch
from torch import nn

from harness.cells import plugins
from harness.contract.cases import Case, ContractBroken, four_images
from harness.method import Method, methods
from harness.util.fork_server import SENT_TO_ALL, fork_context
from harness.util.text import describe

TWO_PROCESSES_SECONDS = 180.0


class ProcessPair:
    """A pair of processes that check one method after another; restarted after a method that did not finish."""

    current: ProcessPair | None = None

    def __init__(self) -> None:
        context = fork_context("harness.launch.preload")  # the same as of jobs: there is one server
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            arguments = (rank, theirs, str(Path(self.folder.name) / "rendezvous"))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @classmethod
    def ask(cls, method: type[Method], backbone: str) -> list[str]:
        """The digest of gradients and parameters from each process. Raises `ContractBroken` if one does not answer."""
        pair = cls.current or cls()
        cls.current = None  # until it has answered in full
        try:
            answers = pair._ask((plugins.reference(method), backbone, plugins.loaded_files()))
        except BaseException:
            pair._end()
            raise
        cls.current = pair
        return answers

    def _ask(self, job: tuple[object, ...]) -> list[str]:
        for pipe in self.pipes:
            try:
                pipe.send(job)
            except Exception as error:  # pickle may raise anything
                raise ContractBroken(f"another process cannot import the method: {describe(error)}") from error
        answers: dict[int, str] = {}
        deadline = time.monotonic() + TWO_PROCESSES_SECONDS
        while len(answers) < 2:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = set(connection.wait(waiting, max(0.0, deadline - time.monotonic())))
            if not ready:
                raise ContractBroken(f"two processes did not finish within {TWO_PROCESSES_SECONDS:.0f} s")
            for rank, pipe in enumerate(self.pipes):
                if pipe not in ready:
                    continue
                try:
                    status, text = pipe.recv()
                except (EOFError, OSError) as error:
                    raise ContractBroken("one of two processes died; see stderr") from error
                if status != "ok":
                    raise ContractBroken(f"one of two processes failed: {text}")
                answers[rank] = text
        return [answers[0], answers[1]]

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, pipe: connection.Connection, rendezvous: str) -> None:
    """One of the two processes: takes jobs and answers with digests until the parent ends."""
    import os
    import signal
    import socket

    signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT_TO_ALL)
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    while True:
        try:
            method, backbone, files = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # the method cannot be imported here
            pipe.send(("failed", describe(error)))
            continue
        try:
            plugins.load(files)
            cls = methods.get(method) if isinstance(method, str) else method
            pipe.send(("ok", _train_in_parallel(Case(cls, backbone), rank)))
        except Exception as error:
            pipe.send(("failed", describe(error)))


def _train_in_parallel(case: Case, rank: int) -> str:
    """Two steps on this process's half of the four images; the digest of all gradients and trained parameters."""
    network = case.build()
    model = nn.parallel.DistributedDataParallel(network).train()
    optimizer = torch.optim.SGD([parameter for _, parameter in network.trained_parameters()], lr=1e-3)
    images, masks = (tensor.chunk(2)[rank] for tensor in four_images())
    state = hashlib.sha256()
    for step in range(2):
        torch.manual_seed(2 * step + rank)
        loss, _ = model(images, masks)
        loss.backward()
        optimizer.step()
        for _, parameter in network.trained_parameters():
            state.update(parameter.grad.contiguous().numpy().tobytes())
            state.update(parameter.detach().contiguous().numpy().tobytes())
        optimizer.zero_grad(set_to_none=True)
    return state.hexdigest()
