"""A ComfyUI server for the tests of this folder."""

import sys

import pytest
from membrane.tools.run import comfy_server, hosts


@pytest.fixture(scope="session")
def server_host():
    """Host the server tests run on: the one MEMBRANE_HOST names, else that of the demo."""
    return hosts.wanted()


@pytest.fixture(scope="session")
def server(server_host):
    """A running Server with this pack in it, shared by all tests of this folder."""
    with comfy_server.Server(server_host.path, sys.executable) as running:
        yield running
