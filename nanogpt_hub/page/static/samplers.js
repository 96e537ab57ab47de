// The samplers of nanogpt_hub/sampling.py for one distribution, so that a slider reshapes it at once.
//
// Each is (logits, value, seen) => logits, by the name of its field of SamplingConfig; -Infinity marks what was cut. A
// sampler that is missing here is computed by the server instead (`distribution` gives null).
nanogpt.samplers = (() => {
  const largest = (logits) => logits.reduce((most, logit) => Math.max(most, logit), -Infinity);

  const apply = {
    repetition_penalty: (logits, penalty, seen) =>
      logits.map((logit, id) => (!seen.has(id) ? logit : logit > 0 ? logit / penalty : logit * penalty)),
    temperature: (logits, temperature) => {
      const most = largest(logits);
      if (temperature >= 1e-5) return logits.map((logit) => (logit - most) / temperature);
      const first = logits.indexOf(most);
      return logits.map((_, id) => (id === first ? 0 : -Infinity));
    },
    top_k: (logits, k) => {
      if (k >= logits.length) return logits;
      const threshold = logits.slice().sort()[logits.length - k];
      return logits.map((logit) => (logit < threshold ? -Infinity : logit));
    },
    top_p: (logits, p) => {
      const probs = softmax(logits);
      const order = Uint32Array.from(probs, (_, id) => id).sort((a, b) => probs[b] - probs[a] || a - b);
      const kept = new Float64Array(logits.length).fill(-Infinity);
      let reached = 0;
      for (const id of order) {
        if (reached >= p && reached > 0) break;
        kept[id] = logits[id];
        reached += probs[id];
      }
      return kept;
    },
    min_p: (logits, p) => {
      const threshold = largest(logits) + Math.log(p);
      return logits.map((logit) => (logit < threshold ? -Infinity : logit));
    },
  };

  const softmax = (logits) => {
    const most = largest(logits), powers = logits.map((logit) => Math.exp(logit - most));
    const total = powers.reduce((sum, power) => sum + power, 0);
    return powers.map((power) => power / total);
  };

  // Numbers of half precision, two bytes each, smallest byte first.
  const halves = (data) => {
    const view = new DataView(data.buffer, data.byteOffset), numbers = new Float64Array(data.length / 2);
    for (let n = 0; n < numbers.length; n++) {
      const bits = view.getUint16(2 * n, true), exponent = (bits >> 10) & 31, fraction = bits & 1023;
      const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? Infinity : (1 + fraction / 1024) * 2 ** (exponent - 15);
      numbers[n] = bits >> 15 ? -size : size;
    }
    return numbers;
  };

  // Probabilities after all samplers. settings: [[name, neutral, value]] in the order in which they apply. null where
  // one that is on is not known here.
  const distribution = (logits, settings, seen) => {
    for (const [name, neutral, value] of settings) {
      if (value === null || value === neutral) continue;
      if (!apply[name]) return null;
      logits = apply[name](logits, value, seen);
    }
    return softmax(logits);
  };

  return { apply, softmax, halves, distribution };
})();
