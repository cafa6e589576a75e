"""Reads a disk as it was at an instant, as scripts for QEMU do it, with the package `qemu.qmp`.

Usage: fleece_client.py SOCKET WAY DEVICE FLEECE NBD COPY COPY

The fleecing image FLEECE, a new qcow2 image, has the disk beneath it and is offered over NBD on the socket NBD. WAY is `job`:
a backup with `sync: none` goes to the image; or `filter`: a copy-before-write filter does. COPY takes what is read.

Says `ready` before the instant and waits for a line, `taken` after it, `copied` after each copy, waits for a line, and `done` at
the end.
"""

import asyncio
import subprocess
import sys

from qemu.qmp import QMPClient

NODE = "temp"


async def main(socket: str, way: str, device: str, fleece: str, nbd: str, *copies: str) -> None:
    """One look at the disk."""
    client = QMPClient("fleece")
    await client.connect(socket)
    blocks = {block["device"]: block for block in await client.execute("query-block")}
    source, path = blocks[device]["inserted"]["node-name"], blocks[device]["qdev"]
    size = blocks[device]["inserted"]["image"]["virtual-size"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", fleece, str(size)], check=True)
    file = {"driver": "file", "filename": fleece}
    await client.execute("blockdev-add", {"driver": "qcow2", "node-name": NODE, "file": file, "backing": source})
    print("ready", flush=True)
    sys.stdin.readline()
    if way == "job":
        arguments = {"job-id": "fleecing", "device": source, "target": NODE, "sync": "none"}
        await client.execute("blockdev-backup", arguments)
    else:
        options = {"driver": "copy-before-write", "node-name": "fl-cbw", "file": source, "target": NODE}
        await client.execute("blockdev-add", options)
        await client.execute("qom-set", {"path": path, "property": "drive", "value": "fl-cbw"})
    print("taken", flush=True)
    await client.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": nbd}}})
    await client.execute("nbd-server-add", {"device": NODE})
    for copy in copies:
        uri = f"nbd+unix:///{NODE}?socket={nbd}"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy], check=True)
        print("copied", flush=True)
    sys.stdin.readline()
    await client.execute("nbd-server-stop")
    if way == "job":
        job = (await client.execute("query-block-jobs"))[0]
        assert (job["device"], job["type"], job["status"], job["len"]) == ("fleecing", "backup", "running", size), job
        with client.listener("BLOCK_JOB_CANCELLED") as listener:
            await client.execute("block-job-cancel", {"device": "fleecing"})
            event = await asyncio.wait_for(listener.get(), 60)
        assert event["data"]["device"] == "fleecing" and event["data"]["offset"] <= event["data"]["len"], event
    else:
        await client.execute("qom-set", {"path": path, "property": "drive", "value": source})
        await client.execute("blockdev-del", {"node-name": "fl-cbw"})
    await client.execute("blockdev-del", {"node-name": NODE})
    await client.disconnect()
    print("done", flush=True)


asyncio.run(main(*sys.argv[1:]))
