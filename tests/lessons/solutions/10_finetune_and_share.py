IGNORE = -100


def inputs_and_targets(prompt, answer, end):
    ids = [*prompt, *answer, end]
    return ids[:-1], [*[IGNORE] * (len(prompt) - 1), *answer, end]
