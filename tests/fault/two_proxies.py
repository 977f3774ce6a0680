"""`python -m tests.fault.two_proxies`: F6 with a second proxy, in a process of its own, for its Ray has two nodes.

Both proxies listen on one port, and the kernel hands out connections: it is the balancer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.cluster_tools import free_port
from tests.fault.load import Load, Reply, ask, undisturbed
from tests.fault.record import Finding, conclude, equal
from tests.fault.scenario import Stage, is_ours, wait_until
from tests.fault.tiny import save_tiny_draft, save_tiny_target, tiny_recipe
from tests.private_ray import start_private_ray

LOAD = Load(stream=True)
LOADED_S, STRIKE_S = 12.0, 4.0
RETRY_S = 0.5
"""After which OpenAI's own client tries again."""


@contextmanager
def second_node() -> Iterator[None]:
    """Another raylet on this machine, with CPUs of its own."""
    import ray

    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={ray.get_runtime_context().gcs_address}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=8", "--min-worker-port=0", "--max-worker-port=0", "--block"]
    node = subprocess.Popen([*command, "--disable-usage-stats"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 60)
        yield
    finally:
        node.terminate()
        node.wait(30)


def proxies() -> list[psutil.Process]:
    """Serve's proxies that run."""
    running = psutil.process_iter(["cmdline"])
    return [p for p in running if "ProxyActor" in "".join(p.info["cmdline"] or ()) and is_ours(p)]


def asked_twice(url: str, client: int, end: float) -> list[list[Reply]]:
    """Requests of one client until a time, each with its next try if the first has failed."""
    found = []
    with httpx.Client(base_url=url, timeout=60) as http:
        while time.monotonic() < end:
            prompt = LOAD.prompt(client, len(found))
            tries = [ask(http, prompt, LOAD)]
            if tries[0].failed:
                time.sleep(RETRY_S)
                tries.append(ask(http, prompt, LOAD))
            found.append(tries)
    return found


def strike(stage: Stage) -> list[Finding]:
    """Kill one of two proxies under eight clients."""
    url = stage.service.url
    expected = undisturbed(url, LOAD)
    victim, _ = proxies()
    end = time.monotonic() + LOADED_S
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(asked_twice, url, client, end) for client in range(8)]
        time.sleep(STRIKE_S)
        victim.kill()
        asked = [tries for client in clients for tries in client.result()]
    again = sum(len(tries) > 1 for tries in asked)
    wrong = sum((tries[-1].text, tries[-1].tokens) != expected[tries[-1].prompt] for tries in asked)
    return [
        equal("failures after the client's first retry", sum(tries[-1].failed for tries in asked), 0),
        Finding(what="requests tried again", required="1 to 8", measured=str(again), met=1 <= again <= 8),
        Finding(what="differing answers", required=f"0 of {len(asked)}", measured=str(wrong), met=not wrong),
    ]


def main() -> None:
    """Run it, and record it as F6."""
    start_private_ray()
    from ray import serve

    from serve_app.handle import serve_pairing

    with tempfile.TemporaryDirectory(prefix="u") as folder, second_node():
        target = save_tiny_target(Path(folder) / "target")
        draft = save_tiny_draft(target, Path(folder) / "draft")
        port = free_port()
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
        handle = serve_pairing(tiny_recipe(target, draft, port=port))
        stage = Stage(service=handle, draft=draft)
        wait_until(stage.is_whole, 120)
        wait_until(lambda: len(proxies()) == 2, 60)
        findings = strike(stage)
        handle.shutdown()
    conclude("F6", "SIGKILL one of two proxies", "8 clients, streams", findings)


if __name__ == "__main__":
    main()
