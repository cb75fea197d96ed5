// Feeds strings of every kind to rle_decode, rle_encode and the arithmetic of sizes, at every instruction set of this CPU, and
// compares the results with the plain code below. Every block has exactly the size it needs, so that AddressSanitizer sees any
// access outside. tools/sanitize.sh builds and runs this program:
//     fuzz_rle [inputs [seed]]     a million inputs from our own generator, the same ones at every run of a seed
// With clang, -fsanitize=fuzzer and -DSPROMPT_LIBFUZZER it is a libFuzzer target instead.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "rle/rle.h"

using sprompt::DType;
using sprompt::View;

namespace {

[[noreturn]] void wrong(const char* what, int64_t height, int64_t width, const std::string& text) {
    std::fprintf(stderr, "fuzz_rle: %s, for %lld x %lld and the bytes", what, static_cast<long long>(height),
                 static_cast<long long>(width));
    for (const unsigned char c : text) std::fprintf(stderr, " %d", c);
    std::fprintf(stderr, "\n");
    std::abort();
}

// A block of exactly n elements, filled with 0xa5.
template <class T>
struct Block {
    std::unique_ptr<T[]> data;
    int64_t count;

    explicit Block(int64_t n) : data(new T[static_cast<size_t>(n)]), count(n) {
        if (n > 0) std::memset(data.get(), 0xa5, static_cast<size_t>(n) * sizeof(T));
    }
    T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
    View view(DType dtype, int64_t rows = -1) {
        View v;
        v.data = data.get();
        v.dtype = dtype;
        v.rank = rows < 0 ? 1 : 2;
        v.size[0] = rows < 0 ? count : rows;
        v.size[1] = rows < 0 ? 0 : count / rows;
        v.stride[0] = rows < 0 ? 1 : v.size[1];
        v.stride[1] = 1;
        return v;
    }
};

struct Kernels {
    const char* level;
    decltype(&sprompt::portable::rle_bounds) bounds;
    decltype(&sprompt::portable::rle_encode) encode;
    decltype(&sprompt::portable::rle_join) join;
    decltype(&sprompt::portable::rle_decode) decode;
};
#define LEVEL(name)                                                                                                         \
    Kernels {                                                                                                               \
        #name, &sprompt::name::rle_bounds, &sprompt::name::rle_encode, &sprompt::name::rle_join, &sprompt::name::rle_decode \
    }

std::vector<Kernels> levels() {
    std::vector<Kernels> found{LEVEL(portable)};
#if SPROMPT_X86
    if (sprompt::best_level() >= sprompt::Level::avx2) found.push_back(LEVEL(avx2));
    if (sprompt::best_level() >= sprompt::Level::avx512) found.push_back(LEVEL(avx512));
#endif
    return found;
}

// ---- the same in plain code: one byte per pixel, numbers of 128 bits

struct Fault {
    int64_t kind, place, value;
    bool operator==(const Fault& o) const { return kind == o.kind && place == o.place && value == o.value; }
};

Fault plain_decode(const std::string& text, int64_t height, int64_t width, std::vector<char>& columns) {
    const int64_t P = height * width;
    std::vector<int64_t> runs;
    for (size_t i = 0; i < text.size();) {
        const size_t start = i;
        __int128 number = 0, unit = 1;
        for (;;) {
            if (i - start == 12) return {sprompt::rle_too_long, static_cast<int64_t>(start), 0};
            if (i == text.size()) return {sprompt::rle_truncated, static_cast<int64_t>(start), 0};
            const int c = static_cast<unsigned char>(text[i]);
            if (c < '0' || c > 'o') return {sprompt::rle_bad_character, static_cast<int64_t>(i), c};
            ++i;
            number += unit * ((c - '0') % 32);
            unit *= 32;
            if (c - '0' < 32) {
                if ((c - '0') % 32 >= 16) number -= unit;
                break;
            }
        }
        const size_t k = runs.size();
        if (k > 2) number += runs[k - 2];
        if (number < 0) return {sprompt::rle_negative, static_cast<int64_t>(k), static_cast<int64_t>(number)};
        if (number > P - static_cast<int64_t>(columns.size()))
            return {sprompt::rle_too_many, static_cast<int64_t>(k), static_cast<int64_t>(number)};
        runs.push_back(static_cast<int64_t>(number));
        columns.insert(columns.end(), static_cast<size_t>(number), static_cast<char>(k % 2));
    }
    const int64_t sum = static_cast<int64_t>(columns.size());
    if (sum < P) return {sprompt::rle_too_few, static_cast<int64_t>(runs.size()), sum};
    return {sprompt::rle_fine, 0, 0};
}

std::string plain_string(const std::vector<int64_t>& runs) {
    std::string text;
    for (size_t k = 0; k < runs.size(); ++k) {
        int64_t v = k > 2 ? runs[k] - runs[k - 2] : runs[k];
        for (bool more = true; more;) {
            const int64_t group = v & 31;
            v = (v - group) / 32;
            more = group < 16 ? v != 0 : v != -1;
            text.push_back(static_cast<char>(48 + group + (more ? 32 : 0)));
        }
    }
    return text;
}

std::string plain_encode(const std::vector<char>& columns) {
    std::vector<int64_t> runs{0};
    char colour = 0;
    for (const char pixel : columns) {
        if (pixel != colour) runs.push_back(0);
        colour = pixel;
        ++runs.back();
    }
    return plain_string(runs);
}

// ---- one input

// Decodes three masks: the second from text, the others from empty strings. The caller chooses the size of words, right or
// wrong.
Fault decode(const Kernels& kernels, const std::string& text, int64_t height, int64_t width, int64_t n,
             Block<uint32_t>& words) {
    Block<uint8_t> bytes(static_cast<int64_t>(text.size()));
    if (!text.empty()) std::memcpy(bytes.data.get(), text.data(), text.size());
    Block<int64_t> offsets(4), faults(9);
    offsets[0] = offsets[1] = 0;
    offsets[2] = offsets[3] = bytes.count;
    View view = words.view(DType::i32, 3);
    view.size[1] = view.stride[0] = n;
    kernels.decode(bytes.view(DType::u8), offsets.view(DType::i64), height, width, view, faults.view(DType::i64, 3), 1);
    return {faults[3], faults[4], faults[5]};
}

std::string encode(const Kernels& kernels, const uint32_t* mask, int64_t n, int64_t height, int64_t width) {
    Block<uint32_t> words(n);
    if (n > 0) std::memcpy(words.data.get(), mask, static_cast<size_t>(4 * n));
    Block<int64_t> starts(2), offsets(2);
    const int64_t bound = kernels.bounds(words.view(DType::i32, 1), height, width, starts.view(DType::i64), 1);
    if (starts[0] != 0 || starts[1] != bound) return "";
    Block<uint8_t> buffer(bound);
    const int64_t length = kernels.encode(words.view(DType::i32, 1), height, width, starts.view(DType::i64),
                                          buffer.view(DType::u8), offsets.view(DType::i64), 1);
    if (length < 0 || length > bound - sprompt::rle_slack || offsets[0] != 0 || offsets[1] != length) return "";
    Block<uint8_t> bytes(length);
    kernels.join(buffer.view(DType::u8), starts.view(DType::i64), offsets.view(DType::i64), bytes.view(DType::u8), 1);
    // If the buffer is too small, rle_encode must report that and must not write outside of it.
    const int64_t capacity = sprompt::rle_slack + bytes.count / 3;
    starts[1] = capacity;
    Block<uint8_t> small(capacity);
    const int64_t shorter = kernels.encode(words.view(DType::i32, 1), height, width, starts.view(DType::i64),
                                           small.view(DType::u8), offsets.view(DType::i64), 1);
    if (shorter >= 0 && shorter != bytes.count) return "";
    return {reinterpret_cast<const char*>(bytes.data.get()), static_cast<size_t>(bytes.count)};
}

void check_offsets(const Kernels& kernels, const std::string& text, int64_t begin, int64_t end) {
    Block<uint8_t> bytes(static_cast<int64_t>(text.size()));
    if (!text.empty()) std::memcpy(bytes.data.get(), text.data(), text.size());
    Block<int64_t> offsets(2), faults(3);
    Block<uint32_t> words(1);
    offsets[0] = begin;
    offsets[1] = end;
    kernels.decode(bytes.view(DType::u8), offsets.view(DType::i64), 4, 8, words.view(DType::i32, 1), faults.view(DType::i64, 1),
                   1);
    const bool inside = begin >= 0 && begin <= end && end <= bytes.count;
    if (inside == (faults[0] == sprompt::rle_bad_offsets)) wrong("offsets are misjudged", begin, end, text);
}

void check_sizes(int64_t height, int64_t width) {
    const __int128 product = static_cast<__int128>(height) * width;
    const int64_t most = sprompt::rle_most_pixels;
    const bool sound = height >= 0 && width >= 0 && height <= most && width <= most && product <= most;
    if (sprompt::rle_pixels(height, width) != (sound ? static_cast<int64_t>(product) : -1))
        wrong("rle_pixels", height, width, "");
    if (!sound) return;
    // In bytes: no overflow, and at most twice the mask and 16 blocks per 64 rows.
    const int64_t scratch = sprompt::rle_scratch(height, width);
    const __int128 bound = 2 * (product / 64) + static_cast<__int128>(16 * 65) * (height / 64 + 1);
    if (scratch < 0 || scratch > bound) wrong("rle_scratch", height, width, "");
}

const std::vector<Kernels>& all() {
    static const std::vector<Kernels> found = levels();
    return found;
}

void check(int64_t height, int64_t width, const std::string& text) {
    check_sizes(height, width);
    const int64_t P = sprompt::rle_pixels(height, width);
    if (P < 0 || P > (1 << 18)) {  // words does not fit such a size: the kernel must refuse it and write nothing
        for (const Kernels& kernels : all()) {
            Block<uint32_t> words(6);
            const Fault fault = decode(kernels, text, height, width, 2, words);
            if (fault.kind != sprompt::rle_bad_size) wrong("a wrong size is taken", height, width, text);
            for (int64_t i = 0; i < 6; ++i)
                if (words[i] != 0xa5a5a5a5u) wrong("words are written", height, width, text);
        }
        return;
    }
    const int64_t n = (P + 31) / 32;
    std::vector<char> columns;
    const Fault expected = plain_decode(text, height, width, columns);
    std::string canonical;
    for (const Kernels& kernels : all()) {
        Block<uint32_t> words(3 * n);
        const Fault fault = decode(kernels, text, height, width, n, words);
        if (!(fault == expected)) wrong("another fault", height, width, text);
        if (fault.kind != sprompt::rle_fine) continue;
        const uint32_t* mask = words.data.get() + n;
        for (int64_t q = 0; q < P; ++q) {
            const int64_t p = q % height * width + q / height;
            if (static_cast<char>(mask[p / 32] >> (p % 32) & 1) != columns[static_cast<size_t>(q)])
                wrong("another pixel", height, width, text);
        }
        if (P % 32 != 0 && mask[n - 1] >> (P % 32) != 0) wrong("padding is set", height, width, text);
        if (canonical.empty()) canonical = plain_encode(columns);
        if (encode(kernels, mask, n, height, width) != canonical) wrong("another string", height, width, text);
        Block<uint32_t> again(3 * n);
        if (decode(kernels, canonical, height, width, n, again).kind != sprompt::rle_fine ||
            (n > 0 && std::memcmp(again.data.get() + n, mask, static_cast<size_t>(4 * n)) != 0))
            wrong("decoding again gives another mask", height, width, text);
    }
}

}  // namespace

// The first two bytes give height and width, the rest is the string.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 2) return 0;
    check(data[0] % 100, data[1], std::string(reinterpret_cast<const char*>(data + 2), size - 2));
    return 0;
}

#if !defined(SPROMPT_LIBFUZZER)
namespace {

struct Random {
    uint64_t state;

    uint64_t bits() {  // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    bool once_in(int64_t n) { return below(n) == 0; }
    // Any 64 bits, most often small or near a power of two.
    int64_t wild() {
        const uint64_t v = bits() >> below(64);
        return static_cast<int64_t>(once_in(3)   ? (uint64_t{1} << below(64)) + static_cast<uint64_t>(below(5)) - 2
                                    : once_in(8) ? ~v
                                                 : v);
    }
};

std::string valid(Random& random, int64_t height, int64_t width) {
    std::vector<int64_t> runs;
    int64_t rest = height * width;
    const size_t longest = random.once_in(100) ? 3000 : 120;
    const int64_t most = 1 + (random.once_in(2) ? random.below(2 * height + 2) : random.below(8));
    while (rest > 0 || runs.empty()) {
        int64_t run = random.once_in(12) ? 0 : random.once_in(20) ? rest : random.below(most) + 1;
        if (run > rest) run = rest;
        if (runs.size() > longest) run = rest;
        runs.push_back(run);
        rest -= run;
    }
    return plain_string(runs);
}

void damage(Random& random, std::string& text) {
    const size_t place = static_cast<size_t>(random.below(static_cast<int64_t>(text.size()) + 1));
    const char character = static_cast<char>(random.once_in(4) ? random.below(256) : 48 + random.below(64));
    switch (random.below(7)) {
        case 0:
            text.insert(place, 1, character);
            break;
        case 1:
            text.erase(place, static_cast<size_t>(1 + random.below(3)));
            break;
        case 2:
            text.resize(place);
            break;
        case 3:
            text.insert(place, std::string(static_cast<size_t>(random.below(15)), random.once_in(2) ? 'P' : 'o'));
            break;
        case 4:
            text += text.substr(place);
            break;
        default:
            if (place < text.size())
                text[place] = random.once_in(3) ? static_cast<char>(text[place] ^ (1 << random.below(8))) : character;
    }
}

void one(Random& random) {
    int64_t height = random.below(24), width = random.below(40);
    if (random.once_in(10)) height = random.below(140);
    if (random.once_in(10)) width = random.below(300);
    if (random.once_in(400)) width = 1000 + random.below(300);
    std::string text;
    const int64_t kind = random.below(8);
    if (kind == 0) {
        text.resize(static_cast<size_t>(random.below(30)));
        for (char& c : text) c = static_cast<char>(random.below(256));
    } else if (kind == 1) {
        text.resize(static_cast<size_t>(random.below(40)));
        for (char& c : text) c = static_cast<char>(48 + random.below(64));
    } else {
        text = valid(random, height, width);
        if (kind > 3)
            for (int64_t k = random.below(4); k >= 0; --k) damage(random, text);
    }
    if (random.once_in(16)) {
        height = random.wild();
        width = random.wild();
    }
    check(height, width, text);
    if (random.once_in(8))
        check_offsets(all()[static_cast<size_t>(random.below(static_cast<int64_t>(all().size())))], text, random.wild(),
                      random.wild());
}

}  // namespace

int main(int argc, char** argv) {
    const long long inputs = argc > 1 ? std::atoll(argv[1]) : 1000000;
    Random random{static_cast<uint64_t>(argc > 2 ? std::atoll(argv[2]) : 1)};
    check(100, 101, plain_string(std::vector<int64_t>(100 * 101, 1)));  // a string far longer than the slack
    for (long long i = 0; i < inputs; ++i) one(random);
    std::printf("fuzz_rle: %lld inputs at", inputs);
    for (const Kernels& kernels : all()) std::printf(" %s", kernels.level);
    std::printf(", no fault\n");
    return 0;
}
#endif
