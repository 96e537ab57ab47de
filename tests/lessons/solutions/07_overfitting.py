def stop_at(val_losses, patience):
    best = 0
    for i, loss in enumerate(val_losses):
        if loss < val_losses[best]:
            best = i
        if i - best >= patience:
            return i, best
    return len(val_losses) - 1, best
