"""The same with Frida: `frida_peer.py WAY PROGRAM CALLS`.

WAY is "c" (a counter in C, inside the process), "js" (a function in JavaScript, inside it too) or "python" (the thread waits until Python
has looked and answered).
"""

from __future__ import annotations

import sys
import threading
from time import process_time_ns

import frida

SCRIPT = """
let hits = 0, looked = null, counter = null, native = null;
const at = name => Process.mainModule.getExportByName(name);
if (WAY === 'c') {
    counter = Memory.alloc(8);
    native = new CModule(`
        #include <gum/guminterceptor.h>
        extern volatile long hits;
        extern volatile long looked;
        void onEnter(GumInvocationContext * context) {
            looked = (long) gum_invocation_context_get_nth_argument(context, 0);
            hits++;
        }
    `, { hits: counter, looked: Memory.alloc(8) });
    Interceptor.attach(at('f'), native);
} else if (WAY === 'js') {
    Interceptor.attach(at('f'), { onEnter(args) { looked = args[0]; hits++; } });
} else {
    Interceptor.attach(at('f'), { onEnter(args) { hits++; send(args[0]); recv('go', () => {}).wait(); } });
}
Interceptor.attach(at('done'), { onEnter(args) {
    send({ hits: counter === null ? hits : counter.readS64().toNumber() });
    recv('go', () => {}).wait();
} });
"""


def main() -> None:
    """Starts the program, taps it, and waits for its end."""
    way, program, calls = sys.argv[1:]
    ended = threading.Event()
    began = 0
    pid = frida.spawn([program, calls], stdio="inherit")
    session = frida.attach(pid)
    session.on("detached", lambda *_: ended.set())
    script = session.create_script(SCRIPT.replace("WAY", repr(way)))

    def answer(message: dict[str, object], _data: object) -> None:
        nonlocal began
        began = began or process_time_ns()
        payload = message.get("payload")
        if isinstance(payload, dict):
            print("hits", payload["hits"], "busy", process_time_ns() - began, flush=True)
        script.post({"type": "go"})

    script.on("message", answer)
    script.load()
    frida.resume(pid)
    if not ended.wait(600):
        raise SystemExit("the process does not end")


if __name__ == "__main__":
    main()
