def test_inputs_and_targets(exercise):
    inputs, targets = exercise.inputs_and_targets([1, 2, 3], [7, 8], end=0)
    exercise.expect(list(inputs) == [1, 2, 3, 7, 8], f"the model reads 1 2 3 7 8, but your inputs are {inputs}")
    exercise.expect(
        list(targets) == [-100, -100, 7, 8, 0],
        f"at 3, the prompt's last token, the answer's first one, 7, is to be predicted, and at 8 the end: "
        f"-100 -100 7 8 0; your targets are {targets}",
    )


def test_a_prompt_of_one_token(exercise):
    inputs, targets = exercise.inputs_and_targets([1], [2], end=9)
    exercise.expect((list(inputs), list(targets)) == ([1, 2], [2, 9]), f"[1, 2] and [2, 9], not {inputs} and {targets}")
