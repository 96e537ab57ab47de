/**
 * SHA-256 and git's SHA-1 of a file, in hexadecimal. The browser's own are used where it has them: pages that are served
 * by http from another machine lack them, and get the ones below (FIPS 180-4).
 */

/** SHA-256: what the Hub says of a large file. */
export async function sha256(bytes) {
  return hex(globalThis.crypto?.subtle ? await crypto.subtle.digest("SHA-256", bytes) : sha256_plain(bytes));
}

/** SHA-1 of the file as git stores it: what the Hub says of a small one. */
export async function git_sha1(bytes) {
  const head = new TextEncoder().encode(`blob ${bytes.length}\0`);
  const blob = new Uint8Array(head.length + bytes.length);
  blob.set(head);
  blob.set(bytes, head.length);
  return hex(globalThis.crypto?.subtle ? await crypto.subtle.digest("SHA-1", blob) : sha1_plain(blob));
}

const hex = (buffer) => [...new Uint8Array(buffer)].map((b) => b.toString(16).padStart(2, "0")).join("");
const rotate_left = (x, n) => (x << n) | (x >>> (32 - n));
const rotate_right = (x, n) => (x >>> n) | (x << (32 - n));

/** Calls `update` with each block of 16 big-endian words of the padded message. */
function for_each_block(bytes, update) {
  const tail_start = bytes.length - (bytes.length % 64);
  const tail = new Uint8Array(bytes.length % 64 < 56 ? 64 : 128);
  tail.set(bytes.subarray(tail_start));
  tail[bytes.length % 64] = 0x80;
  new DataView(tail.buffer).setBigUint64(tail.length - 8, BigInt(bytes.length) * 8n);
  const words = new Int32Array(80);
  for (const part of [bytes.subarray(0, tail_start), tail]) {
    const data = new DataView(part.buffer, part.byteOffset, part.length);
    for (let at = 0; at < part.length; at += 64) {
      for (let i = 0; i < 16; i++) words[i] = data.getInt32(at + i * 4);
      update(words);
    }
  }
}

function to_bytes(words) {
  const data = new DataView(new ArrayBuffer(words.length * 4));
  words.forEach((word, i) => data.setInt32(i * 4, word));
  return data.buffer;
}

/** The first 32 bits of the fractional parts of the square or cube roots of the first n primes. */
function root_bits(n, root) {
  const primes = [];
  for (let p = 2; primes.length < n; p++) if (primes.every((q) => p % q)) primes.push(p);
  return Int32Array.from(primes, (p) => Math.floor((p ** (1 / root) % 1) * 2 ** 32));
}

export function sha256_plain(bytes) {
  const h = root_bits(8, 2), k = root_bits(64, 3);
  for_each_block(bytes, (w) => {
    for (let i = 16; i < 64; i++) {
      const a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (rotate_right(a, 7) ^ rotate_right(a, 18) ^ (a >>> 3)) + w[i - 7] +
        (rotate_right(b, 17) ^ rotate_right(b, 19) ^ (b >>> 10));
    }
    const s = Int32Array.from(h); // a to h of the standard
    for (let i = 0; i < 64; i++) {
      const e = s[4], a = s[0];
      const t1 = (s[7] + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) + ((e & s[5]) ^ (~e & s[6])) +
        k[i] + w[i]) | 0;
      const t2 = ((rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) +
        ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]))) | 0;
      s.copyWithin(1, 0, 7);
      s[4] += t1;
      s[0] = t1 + t2;
    }
    for (let i = 0; i < 8; i++) h[i] += s[i];
  });
  return to_bytes(h);
}

export function sha1_plain(bytes) {
  const h = Int32Array.of(0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0);
  for_each_block(bytes, (w) => {
    for (let i = 16; i < 80; i++) w[i] = rotate_left(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    let [a, b, c, d, e] = h;
    for (let i = 0; i < 80; i++) {
      const mix = i < 20 ? (b & c) | (~b & d) : i >= 40 && i < 60 ? (b & c) | (b & d) | (c & d) : b ^ c ^ d;
      const constant = [0x5a827999, 0x6ed9eba1, 0x8f1bbcdc, 0xca62c1d6][Math.floor(i / 20)];
      [a, b, c, d, e] = [(rotate_left(a, 5) + mix + e + constant + w[i]) | 0, a, rotate_left(b, 30), c, d];
    }
    [a, b, c, d, e].forEach((word, i) => (h[i] += word));
  });
  return to_bytes(h);
}
