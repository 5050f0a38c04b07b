"""Names to choose from on the command line, apart from the modules that need torch."""

DATA_SETS = ("digits", "mnist", "fashion-mnist", "cifar10")
VARIANTS = (
    "plain",
    "general",
    "response",
    "schedule",
    "schedule-default",
    "schedule-long",
    "tune",
    "func-jvp",
    "func-jvp-batch",
    "double-backward",
)
