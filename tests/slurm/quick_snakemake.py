"""Snakemake that asks Slurm about its jobs every second instead of every 5 to 180: tests are short."""

import asyncio
import os

from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def _sleep(self: RemoteExecutor) -> None:
    await asyncio.sleep(1)


RemoteExecutor.sleep = _sleep  # type: ignore[method-assign]
os.environ.setdefault("LLAVA_REQUEUE_INTERVAL_S", "1")

if __name__ == "__main__":
    from snakemake.cli import main

    main()
