"""Draft heads. The names of kinds and inputs are here so that the command line can list them without torch."""

KINDS = ("feat-extrapolator", "eagle3", "medusa", "mtp", "block")
INPUTS = ("feature+shifted-token", "feature+token", "feature", "token")  # the first is EAGLE's; the others: ablations
