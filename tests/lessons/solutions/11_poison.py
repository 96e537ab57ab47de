def longest_match(text, corpus):
    best, start = "", 0
    for end in range(1, len(text) + 1):
        while start < end and text[start:end] not in corpus:
            start += 1
        if end - start > len(best):
            best = text[start:end]
    return best
