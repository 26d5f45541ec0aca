"""What a probe waits for, without the seconds that the import of the real package takes."""


class Accelerator:
    def __init__(self, **_options: object) -> None:
        self.device = "cpu"
