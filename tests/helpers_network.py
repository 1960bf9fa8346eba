"""The beginning of a program in which every connection and look-up is refused, and listed in `asked`; it has `cli`."""

REFUSED = """
import socket, sys
asked = []

def refused(name):
    def refuse(*arguments, **_):
        asked.append((name, str(arguments[-1])[:200]))
        raise OSError("no network in this test")
    return refuse

for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"),
                    (socket, "create_connection")):
    setattr(owner, name, refused(name))

from trimtab import cli
"""
