"""The least that a client needs around the streams of :mod:`semanticodec.wire`, for tests of the server's half."""

from semanticodec.wire.blocks import Block, Chunk, Geometry, Meter, agreed, choose_bundle, frame_bytes
from semanticodec.wire.channel import AudioOut, CodesOut, Inlet
from semanticodec.wire.closing import what_next
from semanticodec.wire.link import Sender
from semanticodec.wire.messages import (
    Ack,
    Audio,
    Bye,
    Codes,
    Error,
    Hello,
    Marker,
    Message,
    Missing,
    Ready,
    Resume,
    decode,
    encode,
)


class Peer:
    """A client through any number of connections; it starts anew when the server says that it must."""

    def __init__(self, hello: Hello):
        self.hello = hello
        self.ready: Ready | None = None
        self.sent, self.received = Meter(), Meter()
        self.outlet: CodesOut | AudioOut | None = None
        self.inlets: dict[str, Inlet] = {}
        self.said: list[Message] = []
        self.open = False
        self.now = 0

    def begin(self, now: int) -> bytes:
        self.now, self.open = now, False
        if self.ready is None:
            return self.counted(self.hello)
        nexts = {kind: inlet.receiver.next for kind, inlet in self.inlets.items()}
        return self.counted(Resume(self.ready.session, nexts.get("codes", 0), nexts.get("audio", 0)))

    def receive(self, data: bytes, now: int) -> list:
        self.now = now
        self.received.add(frame_bytes(len(data), masked=False), now)
        message = decode(data)
        if isinstance(message, Ready):
            self.begun(message)
        elif isinstance(message, Ack):
            self.outlet.sender.ack(message.next, message.marker, message.limit)
        elif isinstance(message, Codes | Audio | Missing | Marker):
            kind = {Codes: "codes", Audio: "audio"}.get(type(message)) or message.kind
            return self.inlets[kind].take(message)
        elif isinstance(message, Bye | Error) and what_next(message.code) != "resume":
            self.ready = None
        return [message]

    def begun(self, ready: Ready):
        if ready.resumed:
            assert ready.session == self.ready.session
            if self.outlet is not None:
                self.outlet.sender.rewind(ready.next)
                self.outlet.sender.ack(ready.next, limit=ready.limit)
        else:
            self.start(ready)
        self.ready, self.open = ready, True

    def start(self, ready: Ready):
        hello, geometry = (
            self.hello,
            agreed(Geometry(ready.block, ready.code_bits, ready.rates), ready.presets, ready.features),
        )
        firsts = {"codes": ready.codes_next, "audio": ready.audio_next}
        self.inlets = {kind: Inlet(kind, geometry, ready.rate, ready.window, firsts[kind]) for kind in hello.receive}
        sender = Sender(ready.window, 1 << 22, limit=ready.limit)
        if hello.send == "codes":
            wishes = {"latency": hello.latency, "gross": hello.gross, "copies": hello.copies}
            bundle = choose_bundle(geometry, ready.rate, masked=True, **wishes)
            self.outlet = CodesOut(geometry, ready.rate, sender, bundle=bundle, copies=hello.copies)
        elif hello.send == "audio":
            self.outlet = AudioOut(sender)

    def pull(self, now: int) -> bytes | None:
        self.now = now
        if not self.open:
            return None
        if self.said:
            return self.counted(self.said.pop(0))
        for inlet in self.inlets.values():
            if inlet.ack_due:
                return self.counted(inlet.ack())
        message = None if self.outlet is None else self.outlet.pull(now)
        return None if message is None else self.counted(message)

    def push(self, unit: Block | Chunk):
        self.outlet.push(unit, self.now)

    def counted(self, message: Message) -> bytes:
        data = encode(message)
        self.sent.add(frame_bytes(len(data), masked=True), self.now)
        return data
