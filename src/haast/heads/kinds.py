"""Names of head kinds and of their inputs. Kept apart so that the command line can list them without loading torch."""

KINDS = ("feat-extrapolator", "eagle3", "medusa")
INPUTS = ("feature+shifted-token", "feature+token", "feature", "token")  # the first is EAGLE's, the others ablations
