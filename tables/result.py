"""What a table answers when it has no row to give."""

MISS = -1  # a lookup found nothing
FULL = -2  # an insert found no room; nothing was changed


class TableFullError(Exception):
    """A table refused an entry.

    Attributes:
        table: Which table.
        used: Entries it holds.
        capacity: Entries it can hold.
    """

    def __init__(self, table: str, used: int, capacity: int) -> None:
        super().__init__(f"{table}: full, {used} of {capacity} entries are in use")
        self.table = table
        self.used = used
        self.capacity = capacity
