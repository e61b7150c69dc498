"""A ComfyUI server for the tests of this folder."""

import os
import sys

import pytest
from membrane.tools.run import comfy_server, hosts


@pytest.fixture(scope="session")
def server_host():
    """Host the server tests run on: the one MEMBRANE_HOST names, else the wheel's."""
    try:
        wanted = os.environ.get("MEMBRANE_HOST")
        return hosts.named(wanted) if wanted else hosts.wheel_host()
    except hosts.HostNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(server_host):
    """A running Server with this pack in it, shared by all tests of this folder."""
    with comfy_server.Server(server_host.path, sys.executable) as running:
        yield running
