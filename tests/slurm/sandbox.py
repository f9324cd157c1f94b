"""A private Slurm on this machine: a controller, two virtual nodes with two fake GPUs each, optionally
accounting.

    python -m tests.slurm.sandbox                       a shell in which `snakemake --profile slurm` works
    python -m tests.slurm.sandbox --accounting          with slurmdbd and MariaDB, so that sacct works
    python -m tests.slurm.sandbox -- squeue             runs one command and stops

Needs root and Debian's packages slurmctld slurmd slurm-client munge (slurmdbd mariadb-server for accounting).
Everything runs in a temporary folder on free ports and ends with the sandbox; a Slurm that this machine may
have is not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
NEEDED_FOR_ACCOUNTS = ("slurmdbd", "mariadbd", "mariadb-install-db")
# Inside a job step SLURM_CONF is stripped, so every command finds its configuration by itself.
SHIMS = ("srun", "sbatch", "squeue", "scontrol", "scancel", "sacct", "sinfo", "sacctmgr")
SBIN = "/usr/sbin:/sbin"


def missing(accounting: bool) -> list[str]:
    """The programs that are not installed."""
    path = f"{os.environ['PATH']}:{SBIN}"
    wanted = [*NEEDED, *(NEEDED_FOR_ACCOUNTS if accounting else ())]
    return [name for name in wanted if shutil.which(name, path=path) is None]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives away by itself."""
    found: list[int] = []
    for port in random.sample(range(12000, 20000), 1000):
        with socket.socket() as item, contextlib.suppress(OSError):
            item.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


PR_SET_PDEATHSIG = 1
PARTITIONS = """\
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=cheap Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=short Nodes=n1 MaxTime=30 State=UP PriorityTier=1
"""


def _end_with_parent() -> None:
    """Daemons must not outlive the sandbox, even when it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Sandbox:
    """The daemons, their configuration and the environment in which commands reach them."""

    def __init__(self, folder: Path, accounting: bool = False, cpus: int = 8) -> None:
        self.folder = folder
        self.accounting = accounting
        self.cpus = cpus
        self.host = socket.gethostname().split(".")[0]
        self.ports = free_ports(5)
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}:{SBIN}",
        }
        for name in [key for key in self.environment if key.startswith("SLURM_") and key != "SLURM_CONF"]:
            del self.environment[name]

    # -- start and stop ------------------------------------------------------------------------------------

    def start(self) -> Sandbox:
        """Starts the daemons and waits until both nodes are idle."""
        self._configure()
        socket_path = self.folder / "munge.sock"
        munge = ["munged", "-F", "--force", f"--key-file={self.folder}/munge.key", f"--socket={socket_path}"]
        self._daemon([*munge, "--pid-file=", "--log-file=", "--seed-file="], "munged")
        self._wait(socket_path.exists, "munged")
        if self.accounting:
            self._start_accounting()
        self._daemon(["slurmctld", "-D"], "slurmctld")
        self.nodes = {node: self._slurmd(node) for node in ("n1", "n2")}
        self._wait_for_nodes()
        return self

    def stop(self) -> None:
        """Cancels all jobs and ends the daemons, newest first."""
        self.output("scancel", "-u", "root")
        with contextlib.suppress(TimeoutError):
            self._wait(lambda: not self.output("squeue", "-h"), "an empty queue", 20)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for device in self.folder.glob("fakegpu*"):
            device.unlink()

    def lose_node(self, name: str) -> None:
        """What a power cut does: nothing on the node ends in order, and the controller is told that it is
        gone.
        """
        while found := self._processes_of(name):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.nodes[name].wait()
        self.output("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")

    def return_node(self, name: str) -> None:
        """Switches a lost node on again and waits until it is idle."""
        self.nodes[name] = self._slurmd(name)
        self.output("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self._wait_for_nodes()

    def _processes_of(self, node: str) -> list[int]:
        """The node's daemons, which write its log, and everything that they started, which is told the
        node's name.
        """
        log, marks = str(self.folder / f"slurmd.{node}.log"), (f"SLURMD_NODENAME={node}\0", str(self.folder))
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (
                    any(str(file.readlink()) == log for file in (entry / "fd").iterdir())
                    or all(mark in (entry / "environ").read_text(errors="replace") for mark in marks)
                ):
                    found.append(int(entry.name))
        return found

    def _slurmd(self, node: str) -> subprocess.Popen[bytes]:
        return self._daemon(["slurmd", "-D", "-N", node], f"slurmd.{node}")

    def _wait_for_nodes(self) -> None:
        self._wait(
            lambda: self.output("sinfo", "-hNp", "gpu", "-o", "%t").split() == ["idle", "idle"],
            "two idle nodes",
        )

    def _daemon(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.out").open("wb")
        daemon = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self.daemons.append(daemon)
        return daemon

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"== {path.name}\n{path.read_text()[-800:]}" for path in sorted(self.folder.glob("*.log"))
                )
                raise TimeoutError(f"waited {seconds} s for {what}\n{logs}")
            time.sleep(0.2)

    def output(self, *command: str) -> str:
        """What a Slurm command prints; empty when it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    # -- configuration -------------------------------------------------------------------------------------

    def _configure(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", "spool.n1", "spool.n2", "bin"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        for number in range(4):  # Slurm wants device files, what they are does not matter
            subprocess.run(["mknod", str(folder / f"fakegpu{number}"), "c", "1", "3"], check=True)
        for name in SHIMS:
            real = shutil.which(name)
            shim = folder / "bin" / name
            shim.write_text(f'#!/bin/sh\nexport SLURM_CONF={folder}/slurm.conf\nexec {real} "$@"\n')
            shim.chmod(0o755)
        (folder / "gres.conf").write_text(
            f"NodeName=n1 Name=gpu File={folder}/fakegpu[0-1]\nNodeName=n2 Name=gpu"
            f" File={folder}/fakegpu[2-3]\n"
        )
        (folder / "cgroup.conf").write_text("")
        (folder / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        folder, host = self.folder, self.host
        lines = {
            "ClusterName": "lab",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": self.ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.sock",
            "CredType": "cred/munge",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "ReturnToService": 2,
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
            "SlurmdSpoolDir": f"{folder}/spool.%n",
            "StateSaveLocation": f"{folder}/state",
            "SlurmctldLogFile": f"{folder}/slurmctld.log",
            "SlurmdLogFile": f"{folder}/slurmd.%n.log",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,bf_interval=1",
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": 1,
            "KillWait": 5,
            "MinJobAge": 300,
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmdParameters": "config_overrides",
            "GresTypes": "gpu",
            **self._accounting_lines(),
        }
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        for name, port in (("n1", self.ports[1]), ("n2", self.ports[2])):
            text += (
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                "RealMemory=16000 Gres=gpu:2 State=UNKNOWN\n"
            )
        return text + PARTITIONS

    def _accounting_lines(self) -> dict[str, object]:
        if not self.accounting:
            return {"AccountingStorageType": "accounting_storage/none"}
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": self.ports[3],
            "AccountingStoragePass": f"{self.folder}/munge.sock",
            "AccountingStoreFlags": "job_comment",
        }

    # -- accounting ----------------------------------------------------------------------------------------

    def _start_accounting(self) -> None:
        folder, port = self.folder, self.ports[4]
        data = ["--no-defaults", "--user=root", f"--datadir={folder}/db"]
        install = ["mariadb-install-db", *data, "--auth-root-authentication-method=socket", "--skip-test-db"]
        subprocess.run(install, check=True, capture_output=True)
        server = [
            "mariadbd",
            *data,
            f"--socket={folder}/mysql.sock",
            f"--port={port}",
            "--bind-address=127.0.0.1",
        ]
        server += [
            "--skip-networking=0",
            f"--pid-file={folder}/mariadbd.pid",
            "--innodb-buffer-pool-size=64M",
        ]
        self._daemon(
            [*server, "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"], "mariadbd"
        )
        client = ["mariadb", "--no-defaults", f"--socket={folder}/mysql.sock", "-e"]
        self._wait(
            lambda: subprocess.run([*client, "select 1"], capture_output=True, check=False).returncode == 0,
            "MariaDB",
        )
        sql = "create database slurm_acct;"
        for place in ("127.0.0.1", "localhost"):
            sql += (
                f"create user slurm@'{place}' identified by 'x'; grant all on slurm_acct.* to"
                f" slurm@'{place}';"
            )
        subprocess.run([*client, sql], check=True)
        conf = folder / "slurmdbd.conf"
        conf.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.sock\nDbdHost={self.host}\nDbdAddr=127.0.0.1\n"
            f"DbdPort={self.ports[3]}\nSlurmUser=root\nStorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={port}\nStorageUser=slurm\nStoragePass=x\nStorageLoc=slurm_acct\n"
            f"LogFile={folder}/slurmdbd.log\nPidFile={folder}/slurmdbd.pid\n"
        )
        conf.chmod(0o600)
        self._daemon(["slurmdbd", "-D"], "slurmdbd")
        self._wait(self._dbd_answers, "slurmdbd")
        for words in ("cluster lab", "account lab Cluster=lab", "user root Account=lab"):
            self.output("sacctmgr", "-i", "add", *words.split())

    def _dbd_answers(self) -> bool:
        done = subprocess.run(
            ["sacctmgr", "-n", "list", "cluster"],
            env=self.environment,
            capture_output=True,
            check=False,
            timeout=60,
        )
        return done.returncode == 0


@contextlib.contextmanager
def running(accounting: bool = False) -> Iterator[Sandbox]:
    """A sandbox for the length of a ``with`` block."""
    lacking = missing(accounting)
    if lacking:
        raise SystemExit(
            f"error: {', '.join(lacking)} not found; on Debian and Ubuntu: apt-get install slurmctld slurmd"
            " slurm-client munge" + (" slurmdbd mariadb-server" if accounting else "")
        )
    if os.geteuid() != 0:
        raise SystemExit("error: the sandbox starts its daemons as root; run it in a container or with sudo")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        sandbox = Sandbox(Path(folder), accounting)
        try:
            yield sandbox.start()
        finally:
            sandbox.stop()


def main(argv: Sequence[str] | None = None) -> None:
    """A shell or a command inside a sandbox."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm.sandbox",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    parser.add_argument("command", nargs="*", help="what to run; a shell when left out")
    options = parser.parse_args(argv)
    with running(options.accounting) as sandbox:
        command = options.command or [os.environ.get("SHELL", "/bin/bash")]
        if not options.command:
            print(
                "Slurm is running: nodes n1 and n2, partitions gpu and high. `exit` stops it.",
                file=sys.stderr,
            )
        status = subprocess.run(command, env=sandbox.environment, check=False).returncode
    raise SystemExit(status)


if __name__ == "__main__":
    main()
