"""What every host of a slice runs at boot. It becomes the slice's startup script, so it imports the standard library and `host_log` alone.

It works out which of the run's processes this host is, gets the code, runs the leader's or a follower's command, forwards the request
to stop, and reports how it ended as a guest attribute, where the worker reads it without a connection to the host. What the command
says goes to this script's own output and, where the run has a bucket, into an object there.

    leader (process 0)   `prefect flow-run execute`: the flow, which starts the trainer as its child
    followers            the trainer itself, with the flow run's parameters; they need no Prefect

A reboot runs it again: the leader goes on with the same flow run, the trainer with its newest checkpoint.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from deployments.tpu.host_log import BucketLog, HostLog

LAUNCH = "prefect-llama-launch"  # the attribute that says what to run, as JSON
NAMESPACE = "prefect-llama"  # of the guest attributes
TERMINATED = "terminated"
REFUSED = 78  # exit status of a host whose command cannot begin, here or on any other slice (EX_CONFIG)
AGENT = "prefect-llama"  # name of this process, by which the shutdown script finds it
SAVE_SECONDS = 40  # for a container to save after SIGTERM, before it is killed; Cloud TPU may take the host earlier
CODE_DIRECTORY = Path("/opt/prefect-llama")
CACHE_DIRECTORY = Path("/var/cache/prefect-llama")  # on the host's disk: a container that is started after a reboot finds it again
CONTAINER = "prefect-llama"
DEVICES = Path("/dev")
LIBC = ctypes.CDLL(None)  # loaded while there is one thread: a child between fork and exec cannot
TRIES = 5


class Metadata:
    """The metadata server of this host."""

    def __init__(self) -> None:
        self._root = f"http://{os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')}/computeMetadata/v1/"

    def attribute(self, name: str, default: str | None = None) -> str:
        """An attribute of the instance; `default` where it has none."""
        try:
            return self.get("instance/attributes/" + name)
        except urllib.error.HTTPError as error:
            if error.code == 404 and default is not None:
                return default
            raise

    def get(self, path: str) -> str:
        """The text at `path`."""
        return self._call(path, None)

    def token(self) -> str:
        """An access token of the host's service account."""
        return json.loads(self.get("instance/service-accounts/default/token"))["access_token"]

    def report(self, name: str, value: object) -> None:
        """Sets a guest attribute. Whoever reads it may be away, but this host's own metadata server is not."""
        self._call(f"instance/guest-attributes/{NAMESPACE}/{name}", str(value))

    def _call(self, path: str, body: str | None) -> str:
        method, data = ("GET", None) if body is None else ("PUT", body.encode())
        request = urllib.request.Request(self._root + path, headers={"Metadata-Flavor": "Google"}, method=method, data=data)
        for left in reversed(range(TRIES)):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.read().decode()
            except (urllib.error.URLError, OSError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if refused or not left:
                    raise
                time.sleep(1)
        raise AssertionError("unreachable")


class Refused(SystemExit):
    """What another boot would meet again."""


class Place:
    """Where this host stands in the run: `process` of `processes`, and the address at which process 0 is found."""

    def __init__(self, metadata: Metadata, port: int) -> None:
        tpu = dict(line.split(": ", 1) for line in metadata.attribute("tpu-env", "").splitlines() if ": " in line)
        tpu = {name: value.strip().strip("'") for name, value in tpu.items()}
        hosts = [entry.split(":")[-1] for entry in metadata.attribute("worker-network-endpoints").split(",") if entry]
        slice_index, slices = int(tpu.get("MEGASCALE_SLICE_ID") or 0), int(tpu.get("MEGASCALE_NUM_SLICES") or 1)
        first = tpu.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] if slices > 1 else hosts[0]
        self.process = slice_index * len(hosts) + int(metadata.attribute("agent-worker-number"))
        self.processes = slices * len(hosts)
        self.coordinator = f"{first or hosts[0]}:{port}"

    def environment(self) -> dict[str, str]:
        """What the trainer reads, and nothing where there is one process only."""
        if self.processes == 1:
            return {}
        return {
            "JAX_COORDINATOR_ADDRESS": self.coordinator,
            "JAX_NUM_PROCESSES": str(self.processes),
            "JAX_PROCESS_ID": str(self.process),
        }


def secrets(metadata: Metadata, names: dict[str, str]) -> dict[str, str]:
    """The values of Secret Manager's newest versions, read with the host's own service account."""
    if not names:
        return {}
    token = metadata.token()
    root = os.environ.get("SECRET_MANAGER_ADDRESS", "https://secretmanager.googleapis.com")
    values = {}
    for variable, name in names.items():
        path = f"{root}/v1/{name}{'' if '/versions/' in name else '/versions/latest'}:access"
        request = urllib.request.Request(path, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                values[variable] = base64.b64decode(json.load(answer)["payload"]["data"]).decode().rstrip("\r\n")
        except urllib.error.HTTPError as error:
            if error.code == 429 or error.code >= 500:
                raise
            raise Refused(
                f"cannot read the secret {name} for {variable} (HTTP {error.code}): give the slice's service account "
                "roles/secretmanager.secretAccessor on it"
            ) from None
    return values


def command_line(launch: dict[str, Any], place: Place, environment: dict[str, str], work: Path) -> tuple[list[str], Path, dict[str, str]]:
    """The command of this host, the directory to run it in, and its environment."""
    shared = work / "shared"  # with the command, which writes into the job what it finds out about this host
    shared.mkdir()
    parameters = shared / "job.json"
    parameters.write_text(json.dumps(launch["follower_job"]))
    command = [part.replace("{job}", str(parameters)) for part in launch["leader" if place.process == 0 else "follower"]]
    if launch.get("image"):
        listed = work / "environment"
        lines = {name: value for name, value in environment.items() if "\n" in value}  # such a file has one line for each value
        with open(os.open(listed, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.writelines(f"{name}={value}\n" for name, value in environment.items() if name not in lines)
        by_name = [argument for name in lines for argument in ("--env", name)]
        return [*docker_run(listed, shared), *by_name, launch["image"], *command], work, dict(os.environ, **lines)
    directory = Path(launch.get("directory") or CODE_DIRECTORY)
    return command, directory, dict(os.environ, **environment)


def docker_run(listed: Path, shared: Path) -> list[str]:
    """`docker run` up to the image, whose user need not be root: it may use the chips, change what is shared, and pin memory.

    v4 shows its chips as /dev/accel*, later generations as /dev/vfio/*, where pinning counts against the user's memlock.
    """
    CACHE_DIRECTORY.mkdir(parents=True, exist_ok=True)
    for place in (shared, CACHE_DIRECTORY):
        place.chmod(0o777)
    for node in (each for pattern in ("accel*", "accel/*", "vfio/**/*") for each in DEVICES.glob(pattern)):
        if node.is_char_device() and node.stat().st_mode & 0o006 != 0o006:
            node.chmod(node.stat().st_mode | 0o666)
    subprocess.run(["docker", "rm", "--force", CONTAINER], capture_output=True, check=False)  # of an agent that was killed
    flags = ["--rm", "--init", "--privileged", "--net=host", "--ulimit", "memlock=-1:-1", "--name", CONTAINER]
    flags += ["--stop-timeout", str(SAVE_SECONDS)]
    mounts = [argument for place in (shared, CACHE_DIRECTORY) for argument in ("-v", f"{place}:{place}")]
    return ["docker", "run", *flags, "--env-file", str(listed), *mounts]


def keep_cache_in_memory() -> None:
    """Makes the cache a file system in memory, of which a TPU VM has several times what its disk has; a reboot begins with an empty one."""
    CACHE_DIRECTORY.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(CACHE_DIRECTORY):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70%,mode=0777", CONTAINER, str(CACHE_DIRECTORY)], check=True)


def pull(image: str, metadata: Metadata) -> None:
    """Pulls the image; from Google's registries with the host's own service account, whose token is on the disk meanwhile only."""
    registry = image.partition("/")[0]
    with tempfile.TemporaryDirectory(prefix="prefect-llama-docker-") as private:
        environment = {**os.environ, "DOCKER_CONFIG": private}
        if registry.endswith(("-docker.pkg.dev", "gcr.io")):
            login = ["docker", "login", "--username", "oauth2accesstoken", "--password-stdin", f"https://{registry}"]
            subprocess.run(login, input=metadata.token().encode(), env=environment, check=True)
        subprocess.run(["docker", "pull", "--quiet", image], env=environment, check=True)


def get_code(launch: dict[str, Any], metadata: Metadata) -> None:
    """Brings the image or the checkout onto this host, unless a boot before did."""
    if launch.get("image"):
        pull(launch["image"], metadata)
    elif not launch.get("directory"):
        if not CODE_DIRECTORY.is_dir():
            subprocess.run(["git", "clone", "--no-checkout", launch["repository"], CODE_DIRECTORY], check=True)
        subprocess.run(["git", "-C", CODE_DIRECTORY, "checkout", "--force", launch["revision"]], check=True)
        subprocess.run(["make", "-C", CODE_DIRECTORY, "setup"], check=True)  # installs the locked, hash-checked packages


def take_name(name: str) -> None:
    """What this process is called by `ps` and `pkill`, 15 characters at most."""
    LIBC.prctl(15, name.encode())  # PR_SET_NAME


def die_with(parent: int) -> None:
    """In a child of `parent`: no command outlives this script, to write beside the one of the next boot."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before that
        os._exit(1)


class Child:
    """The host's one command. SIGTERM reaches it, also when it comes before the command."""

    def __init__(self) -> None:
        self.told_to_stop = False
        self._process: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self.told_to_stop = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def run(self, command: list[str], directory: Path, environment: dict[str, str], log: HostLog) -> int:
        """Runs it to its end; the exit status, of a death by signal as a shell has it."""
        log.say(f"running {shlex.join(command)}")
        agent = os.getpid()
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            preexec_fn=lambda: die_with(agent),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdout is not None
        log.follow(self._process.stdout)
        if self.told_to_stop:
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        return status if status >= 0 else 128 - status


def run_command(metadata: Metadata, child: Child, log: HostLog) -> int:
    """Gets ready what this host is to run, and runs it; its exit status."""
    launch = json.loads(metadata.attribute(LAUNCH))
    place = Place(metadata, launch["coordinator_port"])
    metadata.report("process", place.process)
    if launch.get("logs"):
        log.bucket = BucketLog(metadata.token, f"{launch['logs']}/host-{place.process}.log")
    values = secrets(metadata, launch["secrets"] if place.process == 0 else {})  # trackers and Prefect are the leader's alone
    log.hide(list(values.values()))
    if launch.get("cache_in_memory"):
        keep_cache_in_memory()
    get_code(launch, metadata)
    work = Path(tempfile.mkdtemp(prefix="prefect-llama-"))
    metadata.report("phase", "running")
    return child.run(*command_line(launch, place, dict(launch["env"], **place.environment(), **values), work), log)


def main() -> int:
    """One boot of this host; returns the exit status."""
    take_name(AGENT)
    metadata, child, log = Metadata(), Child(), HostLog()
    for name in ("exit_code", "error"):
        metadata.report(name, "")  # what an earlier boot said is over
    metadata.report("phase", "starting")
    try:
        status = run_command(metadata, child, log)
    except (SystemExit, Exception) as error:
        log.say(f"error: {error}")
        metadata.report("error", str(error)[:1000])
        status = REFUSED if isinstance(error, Refused) else 1
    metadata.report("exit_code", TERMINATED if child.told_to_stop else status)
    log.close()
    metadata.report("phase", "ended")
    return status
