"""A Unix socket between processes of one user: frames with their length before them. Standard library only.

The engine's processes import this and nothing else of FedMira, so that none of them holds a base model, or torch.
"""

import contextlib
import json
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOCKET = "FEDMIRA_SOCKET"  # environment variable: the socket of whoever started the engine's process
_PREFIX = "fedmira-"
MAX_FRAME = 4 << 30  # bytes
SPILLED_BYTES = 1 << 20  # of a frame, from which on it may be received into a file
PIECE_BYTES = 1 << 20
Data = bytes | bytearray | mmap.mmap  # of a frame
_LENGTH = struct.Struct(">Q")


def private_folder(note: Path | None = None) -> Path:
    """Make a folder for a socket that nobody else can enter; its path is short, as paths of sockets must be.

    note: a file that names it, so that the next process removes what one that was killed has left.
    """
    if note is not None and note.is_file():
        left = Path(note.read_text(encoding="utf-8"))
        if left.parent == Path(tempfile.gettempdir()) and left.name.startswith(_PREFIX) and not left.is_symlink():
            (left / "s").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                left.rmdir()
    made = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if note is not None:
        note.unlink(missing_ok=True)  # a link would be followed
        note.write_text(str(made), encoding="utf-8")
    return made


def listen(path: Path) -> socket.socket:
    """Listen on a new socket that only its owner may connect to."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(mask)
    server.listen()
    return server


def accept(server: socket.socket) -> socket.socket:
    """Return the next connection of a process of the same user; those of others are closed."""
    while True:
        connection, _ = server.accept()
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid():
            return connection
        connection.close()


def connect(path: str) -> socket.socket:
    """Connect to a socket. Raises OSError if nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, note: dict[str, Any], frame: Data = b"") -> None:
    """Send a note (JSON) and a frame, which may be empty."""
    text = json.dumps(note).encode()
    connection.sendall(_LENGTH.pack(len(text)) + _LENGTH.pack(len(frame)) + text)
    connection.sendall(frame)


def receive(
    connection: socket.socket, admit: Callable[[int], None] = lambda size: None, spill: Path | None = None
) -> tuple[dict[str, Any], bytearray | mmap.mmap]:
    """Return the next note and frame. Raises EOFError at the end, ValueError if what comes is not a frame of ours.

    admit: called with the frame's size before it is read; it may wait. spill: a folder; a large frame is in a file of
    it that has no name, and not in memory. Raises OSError if that cannot be written.
    """
    head = _exactly(connection, 2 * _LENGTH.size)
    text_length, length = (number for (number,) in _LENGTH.iter_unpack(head))
    if text_length > 1 << 20 or length > MAX_FRAME:
        raise ValueError(f"a frame of {text_length} + {length} bytes: more than the largest allowed ({MAX_FRAME})")
    note = json.loads(_exactly(connection, text_length))
    if not isinstance(note, dict):
        raise ValueError("a note is a JSON object")
    admit(length)
    if spill is None or length < SPILLED_BYTES:
        return note, _exactly(connection, length)
    return note, _spilled(connection, length, spill)


def _spilled(connection: socket.socket, length: int, folder: Path) -> mmap.mmap:
    piece = memoryview(bytearray(PIECE_BYTES))
    with tempfile.TemporaryFile(dir=folder) as file:
        left = length
        while left:  # not through a map: there a full disk kills the process
            count = connection.recv_into(piece, min(left, PIECE_BYTES))
            if not count:
                raise EOFError("the connection was closed")
            file.write(piece[:count])
            left -= count
        file.flush()
        return mmap.mmap(file.fileno(), length)


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = connection.recv_into(view[got:], min(length - got, 1 << 22))
        if not count:
            raise EOFError("the connection was closed")
        got += count
    return data
