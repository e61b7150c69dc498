"""Names and requests that try to get out of the folders, or to keep the server busy."""

import asyncio
import json
import os
import time

import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.errors import ErasureError
from membrane.core.formats import native
from membrane.core.host.files import calibrations, folders, uploads
from membrane.core.host.files.reports import Place
from membrane.core.host.page import routes
from membrane.core.measures.detection import Calibration

OUT = [
    "../x", "../../x", "a/../../x", "a\\..\\..\\x", "..\\..\\x", "\\..\\x", "C:\\x", "C:x", "a/../..", "x\0y",
    "a\ud800b", "a\nb", "x" * 300, "a/" + "y" * 250, "a/" * 2000 + "x", "/etc/x", "\\\\server\\share\\x", ".", "a/..",
    "\u202ex",
]  # fmt: skip


@pytest.fixture
def root():
    (folder,) = folder_paths.get_folder_paths(folders.CATEGORY)
    os.makedirs(folder, exist_ok=True)
    return folder


@pytest.fixture
def outside(tmp_path):
    """Everything outside must be as it was."""
    (tmp_path / "secret.safetensors").write_bytes(b"{}")
    (tmp_path / "secret.txt").write_text("secret words")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    yield tmp_path
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def everything(folder):
    return {os.path.join(where, name) for where, *names in os.walk(folder) for group in names for name in group}


def adapter():
    return ErasureAdapter(Card("UCE", ("star",)), {"map": {"text": TextMap(torch.ones(4, 1), torch.ones(1, 4), (0,))}})


@pytest.mark.parametrize("prefix", OUT)
def test_where_files_are_written(host, root, node, prefix):
    """A sentence, and no file or folder beside those that belong there."""
    before = everything(host.work)
    for write in (
        lambda: node("MembraneSaveAdapter", adapter=adapter(), filename_prefix=prefix),
        lambda: folders.new_adapter_path(prefix, "loras"),
        lambda: Place(prefix).write("json", "{}"),
    ):
        with pytest.raises(ErasureError, match="file name"):
            write()
    assert everything(host.work) == before


@pytest.mark.parametrize("prefix", ["", "  ", "a/b", "a\\b", "\u661f/star", "a/./b", "x..y", "a b"])
def test_where_files_may_be_written(root, prefix):
    path, name = folders.new_adapter_path(prefix)
    assert os.path.realpath(path).startswith(os.path.realpath(root) + os.sep) and "\\" not in name
    files = Place(prefix).write("json", "{}")
    path = os.path.join(folder_paths.get_output_directory(), files["subfolder"], files["filename"])
    assert os.path.isfile(path)
    os.remove(path)


def link(place, target):
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.symlink(target, place)


def test_links_out_of_the_folders(root, outside, node):
    """Neither written nor read through; links inside, and folders that are links as a whole, go on working."""
    output, given = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    places = [os.path.join(root, "out.safetensors"), os.path.join(root, "out"), os.path.join(output, "out"),
              os.path.join(given, "out.txt"), os.path.join(root, "in.safetensors")]  # fmt: skip
    native.save(adapter(), os.path.join(root, "real.safetensors"))
    targets = [outside / "secret.safetensors", outside, outside, outside / "secret.txt",
               os.path.join(root, "real.safetensors")]  # fmt: skip
    for place, target in zip(places, targets):
        link(place, target)
    try:
        with pytest.raises(ErasureError, match="leads outside the model folders"):
            node("MembraneLoadAdapter", adapter_name="out.safetensors")
        with pytest.raises(ErasureError, match="leads outside the model folders"):
            folders.adapter_path("out/secret.safetensors")
        with pytest.raises(ErasureError, match="through a link"):
            node("MembraneSaveAdapter", adapter=adapter(), filename_prefix="out/x")
        with pytest.raises(ErasureError, match="through a link"):
            Place("out/x")
        with pytest.raises(ErasureError, match="leads outside the input folder"):
            folders.input_text_file("out.txt")
        assert folders.load_adapter("in.safetensors").card.concepts == ("star",)
    finally:
        for place in places:
            os.unlink(place)
        os.remove(os.path.join(root, "real.safetensors"))


def test_a_model_folder_that_is_a_link(root, tmp_path, monkeypatch):
    """People keep models on other disks: the folder that the host is told about is what counts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    native.save(adapter(), str(disk / "far.safetensors"))
    link(str(tmp_path / "models"), disk)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, folders.CATEGORY, ([str(tmp_path / "models")], {".safetensors"})
    )
    assert folders.load_adapter("far.safetensors").card.concepts == ("star",)
    assert folders.new_adapter_path("x")[0] == str(tmp_path / "models" / "x_00001_.safetensors")


def test_a_text_file_that_is_too_large(tmp_path, monkeypatch):
    path = os.path.join(folder_paths.get_input_directory(), "large.txt")
    with open(path, "wb") as file:
        file.truncate(folders.LARGEST_TEXT + 1)
    try:
        with pytest.raises(ErasureError, match="expected at most"):
            folders.input_text_file("large.txt")
    finally:
        os.remove(path)


def test_a_pipe_is_no_file(root):
    """Opening one would wait for ever."""
    path = os.path.join(root, "pipe.safetensors")
    os.mkfifo(path)
    try:
        with pytest.raises(ErasureError, match="was not found"):
            folders.adapter_path("pipe.safetensors")
    finally:
        os.remove(path)


def test_damaged_calibrations(monkeypatch):
    """A sentence, whatever is in the file, and its size bounded."""
    monkeypatch.setattr(calibrations, "family_name", lambda model: "SD15")
    os.makedirs(calibrations._folder(), exist_ok=True)
    good = Calibration({"a": 1}, (0.5,), tuple(map(float, range(30))))
    name = calibrations.store(None, good)
    path = os.path.join(calibrations._folder(), name)
    try:
        assert calibrations.find(None, {"a": 1}, (0.5,))[1] == name
        for damage in ("", "[" * 10_000, "{}", '{"format": 1e999}', good.to_json().replace("0.5", "1" + "0" * 400)):
            with open(path, "w", encoding="utf-8") as file:
                file.write(damage)
            with pytest.raises(ErasureError, match="is damaged"):
                calibrations.find(None, {"a": 1}, (0.5,))
        os.truncate(path, calibrations.LARGEST + 1)
        with pytest.raises(ErasureError, match="is damaged"):
            calibrations.find(None, {"a": 1}, (0.5,))
    finally:
        os.remove(path)


# ---------------------------------------------------------------- routes


@pytest.fixture
def ask(monkeypatch):
    """ask(method, path, ...) -> (status, JSON) of the pack's routes on a server of their own."""

    class Host:
        routes = web.RouteTableDef()

    monkeypatch.setattr(routes.PromptServer, "instance", Host, raising=False)
    routes.register()

    async def talk(method, path, options):
        application = web.Application(client_max_size=1 << 30)
        application.add_routes(Host.routes)
        async with TestClient(TestServer(application)) as client, client.request(method, path, **options) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    return lambda method, path, **options: asyncio.run(talk(method, path, options))


@pytest.fixture
def star(root):
    native.save(adapter(), os.path.join(root, "star.safetensors"))
    yield "star.safetensors"
    os.remove(os.path.join(root, "star.safetensors"))


@pytest.mark.parametrize(
    "name", [*OUT, "", "star.safetensors/..", "./../secret", "%2e%2e/x", "calibration", "a" * 5000]
)
def test_names_in_requests(ask, star, outside, name):
    status, found = ask("GET", "/membrane/adapter", params={"name": name.encode("utf-8", "replace").decode()})
    assert status == 400 and ("was not found in" in found["error"])
    stack = json.dumps({"membrane_stack": 1, "entries": [{"adapter": name}]})
    status, found = ask("POST", "/membrane/openings", json={"stack_json": stack, "text": ""})
    assert status == 400 and "was not found in" in found["error"]


def test_routes_only_read(host, ask, star):
    """Every method but the two is refused, and nothing on the disk changes."""
    before = {path: os.stat(path).st_mtime_ns for path in everything(host.work)}
    for path in ("/membrane/adapter", "/membrane/openings"):
        for method in ("PUT", "DELETE", "PATCH"):
            assert ask(method, path)[0] == 405
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        assert ask(method, "/membrane/upload")[0] == 405
    assert ask("POST", "/membrane/adapter")[0] == 405 and ask("GET", "/membrane/openings")[0] == 405
    assert ask("GET", "/membrane/adapter", params={"name": star})[0] == 200
    assert {path: os.stat(path).st_mtime_ns for path in everything(host.work)} == before


def test_what_cannot_be_read_is_an_answer(ask, root, outside):
    """A file that went away, a link out, and a damaged one: a sentence and not the server's own error page."""
    places = [os.path.join(root, name) for name in ("out.safetensors", "bad.safetensors")]
    link(places[0], outside / "secret.safetensors")
    with open(places[1], "wb") as file:
        file.write(b"\xff" * 100)
    try:
        for place in places:
            status, found = ask("GET", "/membrane/adapter", params={"name": os.path.basename(place)})
            assert status == 400 and found["error"].endswith(".")
    finally:
        for place in places:
            os.unlink(place)


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"[" * 500_000, b"{" * 500_000, b'{"text": "a"}', b"null", b"9" * 5000]
)
def test_bodies(ask, body):
    for route in ("/membrane/openings", "/membrane/words"):
        status, found = ask("POST", route, data=body)
        if not (route == "/membrane/words" and body.startswith(b'{"text"')):  # which is a question there
            assert status == 400 and found["error"].endswith(".")


def test_large_requests(ask, star):
    """Bounded with and without a length; rows are counted before any file is opened, and each file is read once."""
    for data in (b" " * (routes.LARGEST + 1), _pieces()):
        status, found = ask("POST", "/membrane/openings", data=data)
        assert status == 400 and "larger than" in found["error"]
    rows = [{"adapter": star}] * (routes.MOST + 1)
    begin = time.monotonic()
    for some, status in ((rows, 400), (rows[1:], 200)):
        text = json.dumps({"membrane_stack": 1, "entries": some})
        assert ask("POST", "/membrane/openings", json={"stack_json": text, "text": "star"})[0] == status
    assert time.monotonic() - begin < 5


async def _pieces():
    for _ in range(20):
        yield b" " * (1 << 17)


def test_rows_are_counted_before_files_are_opened(ask, star, monkeypatch):
    opened = []
    monkeypatch.setattr(routes, "label", lambda path: opened.append(path))
    text = json.dumps({"membrane_stack": 1, "entries": [{"adapter": star}] * (routes.MOST + 1)})
    status, found = ask("POST", "/membrane/openings", json={"stack_json": text, "text": ""})
    assert status == 400 and "expected at most" in found["error"] and not opened


# ---------------------------------------------------------------- uploads

BYTES = {"Content-Type": routes.BYTES}
WRONG = [
    *OUT, "", ".safetensors", "..safetensors", "a.pt", "a.safetensors.exe", "a/b.safetensors", "a\\b.safetensors",
    "../a.safetensors", "C:a.safetensors", "con.safetensors", "NUL.x.safetensors", "a?.safetensors", "a .safetensors ",
    " a.safetensors", "a..safetensors", ".a.safetensors", "a\nb.safetensors", "a\0.safetensors",
    "\u202ea.safetensors", "x" * 300 + ".safetensors",
]  # fmt: skip


def file_of(folder):
    path = folder / "made.safetensors"
    native.save(adapter(), str(path))
    return path.read_bytes()


def upload(ask, name, data, headers=BYTES):
    name = name.encode("utf-8", "replace").decode()
    return ask("POST", "/membrane/upload", params={"name": name}, data=data, headers=headers)


def test_a_file_is_uploaded_once(ask, root, tmp_path):
    data, path = file_of(tmp_path), os.path.join(root, "sent.safetensors")
    try:
        assert upload(ask, "sent.safetensors", data) == (200, {"name": "sent.safetensors"})
        with open(path, "rb") as file:
            assert file.read() == data
        status, found = upload(ask, "sent.safetensors", data + b"x")
        assert status == 400 and "There is a file" in found["error"]
        with open(path, "rb") as file:
            assert file.read() == data
        assert folders.load_adapter("sent.safetensors").card.concepts == ("star",)
    finally:
        os.remove(path)


@pytest.mark.parametrize("name", WRONG)
def test_names_of_uploads(host, ask, outside, tmp_path_factory, name):
    data, before = file_of(tmp_path_factory.mktemp("made")), everything(host.work)
    status, found = upload(ask, name, data)
    assert status == 400 and found["error"].endswith(".")
    assert everything(host.work) == before


def test_what_is_no_adapter_is_not_kept(host, root, ask, tmp_path, monkeypatch):
    data, link_to = file_of(tmp_path), os.path.join(root, "hanging.safetensors")
    before, torch_file = everything(host.work), tmp_path / "torch.pt"
    torch.save({"a": torch.ones(1)}, torch_file)
    for wrong in (b"", b"\xff" * 100, data[:-1], torch_file.read_bytes(), b"{}"):
        status, found = upload(ask, "wrong.safetensors", wrong)
        assert status == 400 and "is no erasure adapter in a safetensors file" in found["error"]
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}):
        status, found = upload(ask, "wrong.safetensors", data, headers)
        assert status == 400 and "holds no file" in found["error"]
    link(link_to, tmp_path / "nowhere.safetensors")
    try:
        assert upload(ask, "hanging.safetensors", data)[0] == 400 and not (tmp_path / "nowhere.safetensors").exists()
    finally:
        os.unlink(link_to)
    monkeypatch.setattr(uploads, "LARGEST", 1 << 18)
    status, found = upload(ask, "large.safetensors", _pieces())
    assert status == 400 and "is larger than" in found["error"]
    assert everything(host.work) == before


def test_a_file_that_came_meanwhile_is_not_replaced(ask, root, tmp_path, monkeypatch):
    path, look = os.path.join(root, "race.safetensors"), uploads._require_adapter

    def late(name, temporary):
        look(name, temporary)
        with open(path, "wb") as file:
            file.write(b"other")

    monkeypatch.setattr(uploads, "_require_adapter", late)
    try:
        assert upload(ask, "race.safetensors", file_of(tmp_path))[0] == 400
        with open(path, "rb") as file:
            assert file.read() == b"other"
        assert [name for name in os.listdir(root) if "race" in name] == ["race.safetensors"]
    finally:
        os.remove(path)
