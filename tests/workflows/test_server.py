"""The server the demo and the workflow tests rely on."""

import socket
import sys

import pytest
from membrane.tools.run.comfy_server import ExecutionFailed, PromptError, Server, ServerError

pytestmark = pytest.mark.workflow


def picture(**image):
    size = {"width": 32, "height": 16, "batch_size": 1, "color": 255}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**size, **image}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "server_test"}},
    }


def test_a_prompt_gives_a_picture(server):
    ticks = []
    entry = server.wait(server.queue(picture()), on_tick=ticks.append, timeout=60)
    ((name, content),) = server.images(entry)
    assert name.startswith("server_test")
    assert content.startswith(b"\x89PNG")
    assert (server.output / name).read_bytes() == content
    assert ticks == sorted(ticks)


def test_a_wrong_value_is_refused_with_node_and_reason(server):
    with pytest.raises(PromptError, match=r"node 1 \(EmptyImage\): .*width"):
        server.queue(picture(width="wide"))


def test_an_unknown_node_class_is_named(server):
    prompt = picture()
    prompt["1"]["class_type"] = "NoSuchNode"
    with pytest.raises(PromptError, match="node 1: .*'NoSuchNode'"):
        server.queue(prompt)


def test_a_prompt_without_outputs_is_refused(server):
    with pytest.raises(PromptError, match="no outputs"):
        server.queue({"1": picture()["1"]})


def test_a_failing_node_is_named(server):
    prompt = picture()
    # Passes validation, fails when run: outside the output folder.
    prompt["2"]["inputs"]["filename_prefix"] = "../../outside"
    with pytest.raises(ExecutionFailed, match=r"node 2 \(SaveImage\) failed: .*outside") as caught:
        server.wait(server.queue(prompt), timeout=60)
    assert (caught.value.node_id, caught.value.node_type) == ("2", "SaveImage")


def test_the_pack_is_loaded(server):
    assert any(name.startswith("Membrane") for name in server.object_info()), server.log_text()


def test_nothing_is_left_after_the_end(server_host):
    with pytest.raises(ValueError, match="on purpose"):
        with Server(server_host.path, sys.executable) as running:
            process, port, work, log = running.process, running.port, running.work, running.log_text
            assert running.get("/queue")["queue_running"] == []
            raise ValueError("on purpose")
    assert process.poll() is not None
    assert not work.exists()
    assert log()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_host_that_does_not_start_tells_why(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "cli_args.py").write_text("")
    (tmp_path / "main.py").write_text("raise SystemExit('no screws left')\n")
    with pytest.raises(ServerError, match=r"(?s)ended while starting \(exit code 1\).*no screws left"):
        Server(tmp_path, sys.executable).start()


def test_a_taken_port_is_refused(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is already in use"):
            Server(tmp_path, sys.executable, port=port).start()
