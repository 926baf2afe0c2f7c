"""A real SLURM cluster of several nodes on this machine, for tests: munge, slurmctld, a slurmd in namespaces of its own
for each node, and, asked for, slurmdbd on a database. Needs root, and Debian's packages (`make test` installs them).

  python -m tests.helpers.cluster FOLDER [none|shim|slurmdbd]     one to play with, until Ctrl-C
"""

from __future__ import annotations

import importlib
import io
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest

from ckd_dist.core.errors import UserError
from tests.helpers.commands import PROGRAMS, ROOT

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
DATABASE = ("slurmdbd", "mariadbd", "mariadb-install-db")


def obstacle(accounting: str = "none") -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    needed = DAEMONS + (DATABASE if accounting == "slurmdbd" else ())
    missing = [name for name in needed if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"a SLURM cluster needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"a SLURM cluster needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Nodes n1, n2, ... with 8 cores and 4 GPUs each, all pretended; partitions main, low (preemptible) and high."""

    def __init__(self, folder: Path, nodes: int = 4, accounting: str = "none"):
        """`folder` must be new, and open to all users; accounting: none, shim (a sacct made of squeue) or slurmdbd."""
        self.folder, self.nodes, self.accounting = folder, nodes, accounting
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(self.conf),
            "PATH": f"{folder}/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def run(self, *words: object, check: bool = True, timeout: float = 60) -> str:
        """Output of a command of SLURM's."""
        done = subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    # --------------------------------------------------------------------------------- start

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        for name in ("bin", "spool", "log", "munge", "tmp", "dev"):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._munge_socket = self.folder / "munge" / "socket"
        self._ports = free_ports(3 + self.nodes)
        self._write_configuration()
        self._write_devices()
        files = (f"--key-file={key}", f"--socket={self._munge_socket}", f"--seed-file={self.folder}/munge/seed")
        more = (f"--pid-file={self.folder}/munge/pid", f"--log-file={self.folder}/log/munged")
        self._daemon("munged", "munged", "--foreground", *files, *more)
        self._until(self._munge_socket.exists, "munged")
        if self.accounting == "slurmdbd":
            self._start_database()
        elif self.accounting == "shim":
            sacct = self.folder / "bin" / "sacct"
            sacct.write_text("#!/bin/sh\necho 'JobID|State'\nexec squeue -h -a -r -t all -o '%i|%T'\n")
            sacct.chmod(0o755)
        self._start_controller()
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        self._until(lambda: self.idle() == self.nodes, "nodes")

    def _start_controller(self, *options: str) -> None:
        self._daemon("slurmctld", "slurmctld", "-D", "-i", *options)
        self._until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def forget_jobs(self) -> None:
        """Restart the controller without the jobs that it knew; accounting keeps its records."""
        controller = self._daemons.pop("slurmctld")
        controller.terminate()
        controller.wait(timeout=30)
        self._start_controller("-c")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, with a host name, an /etc/hosts and a /dev/shm of its own."""
        hosts = self.folder / f"hosts.{name}"
        others = [f"127.0.0.1 n{number}" for number in range(1, self.nodes + 1)]
        hosts.write_text("\n".join([f"127.0.0.1 {name}", f"127.0.0.1 localhost {socket.gethostname()}", *others, ""]))
        script = (
            f"hostname {name} && mount --make-rprivate / && mount --bind {hosts} /etc/hosts "
            f"&& mount -t tmpfs tmpfs /dev/shm && exec slurmd -D -N {name}"
        )
        self._daemon(name, "unshare", "--uts", "--mount", "sh", "-c", script)

    def idle(self) -> int:
        """Number of idle nodes."""
        return len(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split())

    def _daemon(self, name: str, *words: str) -> None:
        with open(self.folder / "log" / f"{name}.start", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _until(self, good, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not good():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"{p.name}: {p.read_text()[-800:]}" for p in sorted((self.folder / "log").iterdir()))
                raise RuntimeError(f"the cluster's {what} did not come up (ended: {dead})\n{logs}")
            time.sleep(0.05)

    def _write_configuration(self) -> None:
        controller, database, _, *nodes = self._ports
        auth = f"AuthType=auth/munge\nAuthInfo=socket={self._munge_socket},cred_expire=8"
        lines = ["AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none"]
        if self.accounting == "slurmdbd":
            lines = [
                "AccountingStorageType=accounting_storage/slurmdbd",
                f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={database}",
                f"AccountingStoragePass={self._munge_socket}",
            ]
        lines += [
            f"NodeName=n{i} NodeHostname=n{i} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=20000 Gres=gpu:4"
            for i, port in enumerate(nodes, start=1)
        ]
        # cred_expire is also the delay before a requeued job starts again; below KillWait + 4 it meets its old step.
        self.conf.write_text(f"""
ClusterName=tests
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
{auth}
SlurmctldPort={controller}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={self.folder}/spool
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/spool/slurmctld.pid
SlurmdPidFile={self.folder}/spool/slurmd.%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld
SlurmdLogFile={self.folder}/log/slurmd.%n
TmpFS={self.folder}/tmp
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
EnforcePartLimits=ALL
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=3
MinJobAge=3600
FirstJobId={1 + int(time.time()) % 50_000_000}
MaxArraySize=3
SlurmdTimeout=10
Waittime=0
MailProg=/bin/true
GresTypes=gpu
{chr(10).join(lines)}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=off MaxTime=1-0
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high PriorityTier=100 PreemptMode=off
""")

    def _write_devices(self) -> None:
        for gpu in range(4):
            (self.folder / "dev" / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{self.nodes}] Name=gpu File={self.folder}/dev/gpu[0-3]\n"
        )
        plain = "CgroupAutomount=no\nConstrainCores=no\nConstrainDevices=no\nConstrainRAMSpace=no\n"
        (self.folder / "cgroup.conf").write_text(plain)

    def _start_database(self) -> None:
        _, port, database_port, *_ = self._ports
        home, password = self.folder / "database", secrets.token_hex(12)
        home.mkdir()
        shutil.chown(home, "mysql")
        plain = ("--no-defaults", "--user=mysql", f"--datadir={home}")
        self.run("mariadb-install-db", *plain, "--skip-test-db", "--auth-root-authentication-method=socket")
        where = (f"--socket={home}/socket", f"--pid-file={home}/pid", "--bind-address=127.0.0.1")
        small = ("--skip-log-bin", "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0")
        self._daemon("mariadbd", "mariadbd", *plain, *where, f"--port={database_port}", *small)
        client = ("mariadb", "--no-defaults", f"--socket={home}/socket", "-uroot", "-e")
        self._until(lambda: subprocess.run([*client, "select 1"], capture_output=True).returncode == 0, "database")
        statements = "create database slurm;"
        for host in ("127.0.0.1", "localhost"):
            user = f"slurm@{host}"
            statements += f"create user {user} identified by '{password}'; grant all on slurm.* to {user};"
        self.run(*client, statements)
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self._munge_socket}\nDbdHost={socket.gethostname()}\n"
            f"DbdAddr=127.0.0.1\nDbdPort={port}\nSlurmUser=root\nLogFile={self.folder}/log/slurmdbd\n"
            f"PidFile={self.folder}/spool/slurmdbd.pid\nStorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={database_port}\nStorageUser=slurm\nStoragePass={password}\nStorageLoc=slurm\n"
        )
        conf.chmod(0o600)
        self._daemon("slurmdbd", "slurmdbd", "-D")
        there = ("sacctmgr", "-n", "-P", "list", "cluster")
        self._until(
            lambda: subprocess.run(there, env=self.environment, capture_output=True).returncode == 0, "slurmdbd"
        )
        self.run("sacctmgr", "-i", "add", "cluster", "tests")

    # --------------------------------------------------------------------------------- stop

    def kill_node(self, name: str) -> None:
        """SIGKILL a node's slurmd and all processes of its jobs."""
        space = os.readlink(f"/proc/{self._daemons[name].pid}/ns/uts")
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/uts") == space:
                    process.kill()
            except (OSError, psutil.NoSuchProcess):
                pass
        self._daemons.pop(name).wait(timeout=20)

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and what they may have left, remove the folder."""
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self.run("scancel", "-u", "root", check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.run("squeue", "-h", check=False).strip():
                time.sleep(0.2)
        for name in reversed(list(self._daemons)):
            self._daemons[name].send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in psutil.process_iter():  # jobs that did not end, and what they started
            try:
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == str(self.conf):
                    process.kill()
            except (psutil.Error, OSError):
                pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.stop()


# ------------------------------------------------------------------------------------------- for tests


@contextmanager
def temporary_cluster(**options) -> Iterator[Cluster]:
    """A cluster in a folder of its own; skipped where there can be none, which is a failure under CI=true."""
    if (reason := obstacle(options.get("accounting", "none"))) is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    # Not in pytest's folder: munge and the database refuse folders that only root may enter.
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    folder.chmod(0o755)
    try:
        with Cluster(folder / "box", **options) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder)


def launch(cluster, module, *words, cwd=ROOT, status=0, env=None):
    """`python -m launch.submit` or `launch.pipeline`, in this process; checks its exit status."""
    environment = {**(cluster.environment if cluster else {}), "PYTHONPATH": f"{ROOT}:{PROGRAMS}", **(env or {})}
    out, err, code = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        for folder in environment["PYTHONPATH"].split(":"):
            patch.syspath_prepend(folder)
        patch.setattr(sys, "argv", [module, *map(str, words)])
        patch.chdir(cwd)
        program: Any = importlib.import_module(f"launch.{module}")
        if "COLUMNS" in environment:  # which its console read when it was made
            patch.setattr(program.console, "width", int(environment["COLUMNS"]))
        try:
            code = program.main()
        except UserError as error:
            print(f"error: {error}", file=err)
            code = 2
    done = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    assert code == status, f"exit status {code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def job_id(done):
    """The id of the job that `launch.submit` says it has submitted."""
    found = re.search(r"^job (\d+)", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return found[1]


def wait_for(good, seconds=120, what=""):
    """Wait until `good()` is true, and fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)


if __name__ == "__main__":
    with Cluster(Path(sys.argv[1]).absolute(), accounting=(sys.argv[2:] or ["none"])[0]) as cluster:
        print(f"export SLURM_CONF={cluster.conf} PATH={cluster.environment['PATH']}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
