"""Encoders as actors of a Ray cluster, one a GPU; the shards are pulled from one queue."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from pipeline.encode import EncoderSpec, Job, Progress, make_vision_shards
from pipeline.engines import Described, all_equal
from pipeline.spool import Made
from pipeline.todo import VisionWork
from schemas.errors import UserError


class OnRay:
    """One encoder an actor. The cache's folder must be reached from every node under one name.

    Joins the cluster that ``ray start`` or the environment variable ``RAY_ADDRESS`` gives, else starts one on this
    machine.

    Args:
        device: "cuda" takes a GPU for each actor, "cpu" none.
        actors: how many; None takes every GPU of the cluster, or one actor a node on the CPU.

    Raises:
        UserError: Ray is not installed, no GPU in the cluster, or an encoder cannot be loaded.
    """

    def __init__(self, spec: EncoderSpec, device: str, actors: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--engine ray needs Ray; install it with: pip install 'dst[ray]'") from None
        self._ray: Any = ray
        self._actors: list[Any] = []
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            self.encoders = actors or self._places(device)
            actor = self._ray.remote(_Actor).options(num_gpus=int(device == "cuda"), num_cpus=0)
            self._actors = [actor.remote() for _ in range(self.encoders)]
            described = self._get([each.load.remote(spec, device, os.getcwd()) for each in self._actors])
            self.described = all_equal(described, spec.compute)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, job: Job, works: Sequence[VisionWork]) -> Generator[Made | Progress, None, None]:
        from ray.util.queue import Queue

        queue = Queue(actor_options={"num_cpus": 0})
        for work in [*works, *([None] * self.encoders)]:
            queue.put(work)
        running = [actor.make.options(num_returns="streaming").remote(job, queue) for actor in self._actors]
        self._actors.append(queue.actor)  # which would stay in a cluster that others started
        try:
            while running:
                [ready], running = self._ray.wait(running, num_returns=1)
                reference = next(ready, None)
                if reference is not None:
                    running.append(ready)
                    yield self._get(reference)
        except BaseException:
            self._end()
            raise

    def _places(self, device: str) -> int:
        if device == "cpu":
            return sum(node["Alive"] for node in self._ray.nodes())
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        if not gpus:
            raise UserError(
                "the Ray cluster has no GPU; use --device cpu, or start its nodes with --num-gpus"
            )
        return gpus

    def _get(self, references: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._ray.get(references)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError | OSError):
                raise cause from None
            raise
        except RayActorError as error:
            raise UserError(
                f"an encoder's actor ended ({' '.join(str(error).split())[:200]}); run again, finished shards are kept"
            ) from None

    def _end(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()


class _Actor:
    """An encoder and what makes shards with it, on some node."""

    def load(self, spec: EncoderSpec, device: str, folder: str) -> Described:
        os.chdir(folder)  # label tables may name videos relative to where the user stands
        self._encoder = spec.load(device)
        return Described.of(self._encoder)

    def make(self, job: Job, queue: Any) -> Iterator[Made | Progress]:
        yield from make_vision_shards(self._encoder, job, iter(queue.get, None))
