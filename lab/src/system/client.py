# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a management program does: connect, resize, listen."""
import asyncio
import sys

from qemu.qmp import EventListener, QMPClient

PATH = "/machine/peripheral/vmem0"
TARGET = 1 << 30


async def main():
    client = QMPClient("test")
    sizes = EventListener(names=["MEMORY_DEVICE_SIZE_CHANGE"])
    client.register_listener(sizes)
    states = EventListener(names=["STOP", "RESUME"])
    client.register_listener(states)
    await client.connect(sys.argv[1])
    status = await client.execute("query-status")
    assert status == {"running": True, "status": "running"}, status
    commands = {c["name"] for c in await client.execute("query-commands")}
    assert {"stop", "cont", "qom-set", "query-qmp-schema"} <= commands, commands
    await client.execute("query-qmp-schema")

    await client.execute("stop")
    assert (await asyncio.wait_for(states.get(), 60))["event"] == "STOP"
    await client.execute("cont")
    assert (await asyncio.wait_for(states.get(), 60))["event"] == "RESUME"

    await client.execute(
        "qom-set", {"path": PATH, "property": "requested-size", "value": TARGET}
    )
    while True:
        event = await asyncio.wait_for(sizes.get(), 60)
        data = event["data"]
        assert data["id"] == "vmem0" and data["qom-path"] == PATH, event
        print("size", data["size"])
        if data["size"] == TARGET:
            break
    devices = await client.execute("query-memory-devices")
    assert devices[0]["data"]["size"] == TARGET, devices
    summary = await client.execute("query-memory-size-summary")
    assert summary["plugged-memory"] == TARGET, summary
    text = await client.execute(
        "human-monitor-command",
        {"command-line": "qom-set vmem0 requested-size 300M"},
    )
    assert text == "", text
    text = await client.execute(
        "human-monitor-command", {"command-line": "info memory-devices"}
    )
    assert "requested-size: 314572800" in text, text
    await client.disconnect()
    print("client: ok")


asyncio.run(main())
