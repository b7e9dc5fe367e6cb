"""A Python program for `trapline demo` to probe: it keeps orders in SQLite, and counts what it asked SQLite to do.

Says READY by making a file, works from SIGUSR1 to SIGTERM, then writes its own counts to REPORT, and ends. Standard
library only: any python3 runs it.
"""

import json
import random
import signal
import sqlite3
import sys
import time

CUSTOMERS = ("Ada", "Grace", "Edsger", "Barbara", "Donald", "Frances", "Alan", "Margaret")
GOODS = (
    "tea",
    "paper",
    "ink",
    "a lamp",
    "two chairs",
    "string, 40 m",
    "a very long rope that nobody has ever measured",
)


def main(ready: str, report: str) -> None:
    going = True

    def stop(signum: int, frame: object) -> None:
        nonlocal going
        going = False

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGTERM, stop)
    # No implicit transactions, and the schema is read before it begins: every statement is then one sqlite3_step.
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("create table orders (number integer primary key, customer text, goods text, price integer)")
    db.execute("delete from orders")
    open(ready, "w").close()
    signal.sigwait({signal.SIGUSR1})
    steps = texts = number = 0
    while going:
        number += 1
        order = (number, random.choice(CUSTOMERS), random.choice(GOODS), random.randrange(100, 9000))
        db.execute("insert into orders values (?, ?, ?, ?)", order)
        steps, texts = steps + 1, texts + 2
        if number % 10 == 0:
            db.execute("delete from orders where number <= ?", (number - 100,))
            steps += 1
        time.sleep(0.05)
    with open(report, "w") as file:
        json.dump({"sqlite3_step": steps, "sqlite3_bind_text": texts}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
