"""The command `weftline`."""


def main() -> int:
    return 0
