"""The whole workflow on a machine whose only way out is counted: not one packet leaves, not even a
question for a name.
"""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.support.workspace import Workspace
from workflow_scripts.launch.preflight import importable

# A network of its own: loopback, and one cable that every other address is reached by. Nothing of the
# kernel's own may be counted: no IPv6, no ARP. Names are asked for over the cable too; the hosts file is what
# every Linux brings.
NETWORK = """
set -e
ip link set lo up
ip link add cable0 type veth peer name cable1
for end in cable0 cable1; do
    switch=/proc/sys/net/ipv6/conf/$end/disable_ipv6
    [ ! -e $switch ] || echo 1 > $switch
    ip link set $end arp off
    ip link set $end up
done
ip address add 198.51.100.1/24 dev cable0
ip route add default dev cable0
mount --bind $1/resolv.conf /etc/resolv.conf
mount --bind $1/hosts /etc/hosts
count=$1/packets
shift
[ $# = 0 ] || "$@" || status=$?
# receive has eight columns, then come bytes and packets that were sent
sed -n 's/^ *cable0: *//p' /proc/self/net/dev | tr -s ' ' | cut -d ' ' -f 10 > $count
exit ${status:-0}
"""


def alone(folder, *command, **options):
    """Runs a command in that network; gives what it printed and how many packets it sent into it."""
    folder.mkdir(exist_ok=True)
    (folder / "resolv.conf").write_text("nameserver 192.0.2.53\noptions timeout:1 attempts:1\n")
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n::1 localhost\n")
    base = ["unshare", "--net", "--mount", "bash", "-c", NETWORK, "bash", str(folder)]
    done = subprocess.run(
        [*base, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **{"timeout": 600, **options},
    )
    counted = folder / "packets"
    return done, int(counted.read_text()) if counted.is_file() else None


@pytest.fixture(scope="module", autouse=True)
def networks_can_be_made(tmp_path_factory):
    if os.getuid() != 0:
        pytest.skip("a network namespace needs root")
    missing = [tool for tool in ("unshare", "ip") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is missing (Debian's packages util-linux, iproute2)")
    done, sent = alone(tmp_path_factory.mktemp("probe"))
    if done.returncode or sent is None:
        pytest.skip(f"no network namespace with a virtual cable here: {done.stdout.strip()}")


@pytest.mark.parametrize(
    "code",
    [
        "s = socket.socket(); s.settimeout(0.2); s.connect(('192.0.2.1', 443))",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
        "socket.getaddrinfo('huggingface.example', 443)",
    ],
    ids=["connection", "datagram", "name"],
)
def test_whatever_is_tried_is_counted(tmp_path, code):
    _, sent = alone(tmp_path / "network", sys.executable, "-c", f"import socket; {code}")
    assert sent >= 1


@pytest.mark.slow
def test_nothing_is_sent_from_the_first_picture_to_the_report(tmp_path, monkeypatch):
    """Both stages, stage 2 with two processes; no variable of the environment asks for it."""
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))]:
        monkeypatch.delenv(name)
    workspace = Workspace(tmp_path / "w").draw()
    config = workspace.config
    config["compute"]["two"] = {
        **config["compute"]["small"],
        "per_device_batch_size": 4,
        "processes_per_node": 2,
        "parallel": "ddp",
    }
    config["stages"]["finetune"]["compute"] = "two"
    config["experiments"] = {"vanilla": {}}
    # those of them that are installed
    config["stages"]["finetune"]["report_to"] = [
        name for name in ("tensorboard", "wandb", "trackio") if importable(name)
    ]
    # Snakemake's plugin asks an installed Slurm at its start, which without this looks for its controller by
    # name.
    environment = workspace.environment() | {"SLURM_CONF": "/dev/null", "TRACKIO_DIR": str(tmp_path)}
    done, sent = alone(tmp_path / "network", *workspace.command(), cwd=workspace.folder, env=environment)
    assert done.returncode == 0, done.stdout[-6000:]
    assert (
        workspace.json("experiments/vanilla/checkpoint.json")
        and (workspace.folder / "report/index.html").is_file()
    )
    assert len(list(workspace.folder.glob("runs/finetune/*/*/tensorboard/events.*"))) == 1
    assert sent == 0
