"A JupyterLab of its own and a headless Chromium that looks at it: nothing is read from, or left in, the user's home."
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # keep every output in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
HARMLESS: tuple[str, ...] = ()  # console errors that say nothing about our page


def free_port() -> int:
    "A port that nobody listens on now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def needs_browser():
    "playwright's sync API and the path of chromium, or a skip that names what is missing."
    api = pytest.importorskip("playwright.sync_api", reason="no browser test: playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None: pytest.skip("no browser test: chromium is not on the PATH")
    return api, path


@contextmanager
def lab(folder: Path, home: Path, patience: float=30.):
    "Serve `folder`; yield address and token; stop the server that was started, and no other."
    for name, value in SETTINGS.items():
        file = home/".jupyter/lab/user-settings/@jupyterlab"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    port, token = free_port(), secrets.token_hex(8)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "XDG"))}
    env |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1"),
        *(f"--port={port}", "--port-retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    with open(home/"server.log", "w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            address, stop = f"http://127.0.0.1:{port}", time.time() + patience
            while True:
                try:
                    urllib.request.urlopen(f"{address}/api?token={token}", timeout=2).close()
                    break
                except OSError:
                    if server.poll() is not None or time.time() > stop:
                        said = (home/"server.log").read_text()[-2000:]
                        raise RuntimeError(f"JupyterLab did not start:\n{said}") from None
                    time.sleep(.1)
            yield address, token
        finally:
            server.terminate()
            try: server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextmanager
def page(api, path: str, size=(1400, 1200)):
    "A fresh page and the list of errors that it will collect."
    errors: list[str] = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=CHROMIUM)
        try:
            p = browser.new_page(viewport=dict(width=size[0], height=size[1]))
            note = lambda text: errors.append(text) if not any(h in text for h in HARMLESS) else None
            p.on("console", lambda m: note(f"{m.text} ({m.location.get('url', '')})") if m.type == "error" else None)
            p.on("pageerror", lambda e: note(f"uncaught: {e}"))
            yield p, errors
        finally:
            browser.close()


READY = """() => {
    const text = q => document.querySelector(q)?.textContent ?? 'No Kernel';
    const at = document.querySelector('.jp-Notebook-ExecutionIndicator');
    return document.querySelector('.jp-Notebook .jp-CodeCell') && text('.jp-Toolbar-kernelName') != 'No Kernel'
           && at && !['initializing', 'connecting', 'starting'].includes(at.dataset.status) }"""


def run_all(p) -> None:
    "Run > Run All Cells, once the notebook has its kernel: before that JupyterLab would ask for one."
    p.wait_for_function(READY, timeout=60_000)
    p.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    p.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
