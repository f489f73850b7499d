"""A Python breakpoint in gdb, which looks at one register at each hit. Run inside gdb: bench_table.py has the command."""

import time

import gdb


class Look(gdb.Breakpoint):
    """Counts, looks, goes on."""

    hits = 0
    began = ended = 0

    def stop(self) -> bool:
        """Is called at each hit; False lets the process go on."""
        self.hits += 1
        self.ended = time.process_time_ns()
        self.began = self.began or self.ended
        int(gdb.parse_and_eval("$rdi"))
        return False


gdb.execute("set confirm off")
gdb.execute("set pagination off")
look = Look("*f", internal=True)
gdb.execute("run")
print(f"hits {look.hits} busy {look.ended - look.began}")
