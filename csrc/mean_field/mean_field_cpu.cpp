// A pixel outside its box never changes. So the state of a crop is that of the window around its box, with a border of one
// pixel. The window is cut into pieces of rows. A piece is computed only if a pixel in it or beside it changed in the last
// iteration: else it would get the numbers that it has.
#include "mean_field/mean_field.h"

#include "common/bits.h"
#include "common/lanes.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "common/unfused.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

constexpr int64_t PIECE = 32;  // pixels
constexpr float tiny = 0x1p-126f;

struct Numbers {
    int64_t iterations;
    float factor, low, high, least, most, epsilon;
};

// The rows and columns of pixels in the box.
struct Window {
    int64_t top, bottom, left, right;  // bottom and right are exclusive
    SPROMPT_INLINE int64_t height() const { return bottom - top; }
    SPROMPT_INLINE int64_t width() const { return right - left; }
};

void read_row(const View& map, int64_t offset, int64_t n, float* out) {
    SPROMPT_FLOAT_TYPES(map.dtype, T, row_to_float(map.as<const T>() + offset, n, out))
}

// One crop's memory. Planes have a border of one pixel: row y + 1 and column x + 1 are those of pixel (y, x) of the window.
// Rows are `line` apart, and hold `pieces` pieces behind the left border. Pixels behind the window's last column are outside
// the box.
struct Crop {
    int64_t line, pieces;
    float *east, *south, *south_east, *south_west;  // weights of a pixel and its neighbour there
    float* log_t;                                   // minus infinity outside the box
    float *z[2], *p[2];                             // states, p = softplus(z): those of even and of odd iterations
    float* colours[2];                              // (3, line): two rows, NaN outside the map
    uint8_t* moved[2];                              // (height + 2, pieces + 2) pieces that the last iteration changed

    SPROMPT_INLINE static int64_t pieces_for(int64_t w) { return (w + PIECE - 1) / PIECE; }
    // A row, the border, and as much as neighbours of dropped lanes may reach.
    SPROMPT_INLINE static int64_t line_for(int64_t w) { return pieces_for(w) * PIECE + 2 * PIECE; }
    SPROMPT_INLINE static int64_t plane_for(int64_t h, int64_t w) { return (h + 3) * line_for(w); }
    SPROMPT_INLINE static int64_t floats_for(int64_t h, int64_t w) { return 9 * plane_for(h, w) + 6 * line_for(w); }
    SPROMPT_INLINE static int64_t flags_for(int64_t h, int64_t w) { return (h + 2) * (pieces_for(w) + 2); }

    SPROMPT_INLINE Crop(float* floats, uint8_t* flags, const Window& window) {
        const int64_t plane = plane_for(window.height(), window.width());
        line = line_for(window.width());
        pieces = pieces_for(window.width());
        float** const planes[] = {&east, &south, &south_east, &south_west, &log_t, &z[0], &z[1], &p[0], &p[1]};
        for (float** one : planes) {
            *one = floats;
            floats += plane;
        }
        colours[0] = floats;
        colours[1] = floats + 3 * line;
        moved[0] = flags;
        moved[1] = flags + flags_for(window.height(), window.width());
    }
};

SPROMPT_INLINE void fill(float* out, int64_t n, float x) {
    for (int64_t i = 0; i < n; ++i) out[i] = x;
}

// row (3, line) <- row y of the image, from column window.left - 1 on.
void read_colours(const View& images, int64_t b, int64_t y, const Window& window, int64_t line, float* row) {
    const int64_t h = images.size[2], w = images.size[3];
    const int64_t first = window.left > 0 ? window.left - 1 : 0, end = window.right < w ? window.right + 1 : w;
    fill(row, 3 * line, __builtin_nanf(""));
    if (y < 0 || y >= h) return;
    for (int64_t c = 0; c < 3; ++c)
        read_row(images, b * images.stride[0] + c * images.stride[1] + y * images.stride[2] + first, end - first,
                 row + c * line + first - (window.left - 1));
}

// The weights of W pixels with others, whose colours lie at `a` and `b` in rows of colours.
SPROMPT_INLINE vf weight(const float* a, const float* b, int64_t line, vf factor) {
    const vf red = load(a) - load(b), green = load(a + line) - load(b + line), blue = load(a + 2 * line) - load(b + 2 * line);
    const vf w = Exact::exp(((red * red + green * green) + blue * blue) * factor);
    return select(w == w, w, vf{});
}

void fill_weights(const View& images, int64_t b, const Window& window, const Numbers& numbers, const Crop& crop) {
    const vf factor = broadcast(numbers.factor);
    const int64_t line = crop.line, plane = Crop::plane_for(window.height(), window.width());
    fill(crop.east, 4 * plane, 0.0f);  // the four planes lie one behind the other
    read_colours(images, b, window.top - 1, window, line, crop.colours[0]);
    for (int64_t y = 0; y <= window.height(); ++y) {
        const float* here = crop.colours[y % 2];
        float* below = crop.colours[1 - y % 2];
        read_colours(images, b, window.top + y, window, line, below);
        for (int64_t x = 0; x < window.width() + 2; x += W) {
            const int64_t at = y * line + x;
            store(crop.east + at, weight(here + x, here + x + 1, line, factor));
            store(crop.south + at, weight(here + x, below + x, line, factor));
            store(crop.south_east + at, weight(here + x, below + x + 1, line, factor));
            // The weights belong to the pixels one column to the right, since column 0 has no neighbour in the south-west.
            store(crop.south_west + at + 1, weight(here + x + 1, below + x, line, factor));
        }
    }
}

// log t and the first state.
void fill_state(const View& start, const View& boxes, int64_t b, const Window& window, const Numbers& numbers,
                const Crop& crop) {
    const vf low = broadcast(numbers.low), high = broadcast(numbers.high), least = broadcast(numbers.least),
             most = broadcast(numbers.most), one = broadcast(1.0f), outside = broadcast(-__builtin_inff());
    const int64_t plane = Crop::plane_for(window.height(), window.width());
    float rest[W];
    store(rest, Exact::softplus(least));
    for (int side = 0; side < 2; ++side) {
        fill(crop.z[side], plane, numbers.least);
        fill(crop.p[side], plane, rest[0]);
    }
    fill(crop.log_t, plane, -__builtin_inff());
    float *box = crop.colours[0], *first = crop.colours[1];
    fill(box, crop.line, 0.0f);
    fill(first, crop.line, 0.0f);
    for (int64_t y = 0; y < window.height(); ++y) {
        const auto offset = [&](const View& map) { return b * map.stride[0] + (window.top + y) * map.stride[1] + window.left; };
        read_row(boxes, offset(boxes), window.width(), box);
        read_row(start, offset(start), window.width(), first);
        for (int64_t x = 0; x < window.width(); x += W) {
            const int64_t at = (y + 1) * crop.line + x + 1;
            const vf t = load(box + x);
            const vi inside = t >= tiny;
            store(crop.log_t + at, select(inside, Exact::log(select(inside, t, one)), outside));
            vf q = load(first + x) * t;
            q = select(inside & (q > low), q, low);
            q = select(q < high, q, high);
            vf z = Exact::log(q / (one - q));
            z = minimum(maximum(z, least), most);
            z = select(inside, z, least);
            store(crop.z[0] + at, z);
            store(crop.p[0] + at, Exact::softplus(z));
        }
    }
}

// A u at W pixels. Sums are in an order that flips and transposition do not change.
SPROMPT_INLINE vf sums(const Crop& crop, const float* u, int64_t at) {
    const int64_t above = at - crop.line, below = at + crop.line;
    const auto product = [&](const float* weights, int64_t of, int64_t pixel) { return load(weights + of) * load(u + pixel); };
    const vf across = product(crop.east, at, at + 1) + product(crop.east, at - 1, at - 1);
    const vf along = product(crop.south, at, below) + product(crop.south, above, above);
    const vf falling = product(crop.south_east, at, below + 1) + product(crop.south_east, above - 1, above - 1);
    const vf rising = product(crop.south_west, at, below - 1) + product(crop.south_west, above + 1, above + 1);
    return (load(u + at) + (across + along)) + (falling + rising);
}

// Writes the next state of a piece. Returns whether it differs from the last.
SPROMPT_INLINE bool advance(const Crop& crop, int from, int64_t first, const Numbers& numbers) {
    const vf least = broadcast(numbers.least), most = broadcast(numbers.most), epsilon = broadcast(numbers.epsilon);
    const float *z = crop.z[from], *p = crop.p[from];
    vi changed{};
    for (int64_t at = first; at < first + PIECE; at += W) {
        vf next = (load(crop.log_t + at) + sums(crop, z, at)) - Exact::softplus(sums(crop, p, at) + epsilon);
        next = minimum(maximum(next, least), most);
        changed |= next != load(z + at);
        store(crop.z[1 - from] + at, next);
        store(crop.p[1 - from] + at, Exact::softplus(next));
    }
    return bits_of(changed) != 0;
}

// Returns which of the two states is the last.
int iterate(const Window& window, const Numbers& numbers, const Crop& crop) {
    const int64_t height = window.height(), flags = crop.pieces + 2;
    for (int64_t i = 0; i < (height + 2) * flags; ++i) crop.moved[0][i] = crop.moved[1][i] = 0;
    for (int64_t y = 1; y <= height; ++y)  // so that the first iteration computes every piece
        for (int64_t piece = 1; piece <= crop.pieces; ++piece) crop.moved[0][y * flags + piece] = 1;
    int from = 0;
    for (int64_t iteration = 0; iteration < numbers.iterations; ++iteration) {
        const uint8_t* before = crop.moved[from];
        uint8_t* now = crop.moved[1 - from];
        bool any = false;
        for (int64_t y = 1; y <= height; ++y)
            for (int64_t piece = 0; piece < crop.pieces; ++piece) {
                const uint8_t* near = before + (y - 1) * flags + piece;
                int beside = 0;
                for (int64_t row = 0; row < 3; ++row)
                    for (int64_t column = 0; column < 3; ++column) beside |= near[row * flags + column];
                const bool moves = beside != 0 && advance(crop, from, y * crop.line + 1 + piece * PIECE, numbers);
                now[y * flags + piece + 1] = moves;
                any |= moves;
            }
        from = 1 - from;
        if (!any) break;
    }
    return from;
}

// Sets the bits of a crop. `words` are 0 before.
void write_bits(const Window& window, int64_t w, const float* z, int64_t line, uint32_t* words) {
    for (int64_t y = 0; y < window.height(); ++y)
        for (int64_t x = 0; x < window.width(); x += W) {
            // Pixels behind the window are not set.
            const uint64_t bits = bits_greater(load(z + (y + 1) * line + x + 1), vf{});
            const int64_t pixel = (window.top + y) * w + window.left + x;
            const uint64_t both = bits << (pixel % 32);
            words[pixel / 32] |= static_cast<uint32_t>(both);
            if (both >> 32) words[pixel / 32 + 1] |= static_cast<uint32_t>(both >> 32);
        }
}

// Empty if no pixel is in the box. `row` has w numbers.
Window find_window(const View& boxes, int64_t b, float* row) {
    const int64_t h = boxes.size[1], w = boxes.size[2];
    Window window{h, 0, w, 0};
    for (int64_t y = 0; y < h; ++y) {
        read_row(boxes, b * boxes.stride[0] + y * boxes.stride[1], w, row);
        for (int64_t x = 0; x < w; ++x) {
            if (!(row[x] >= tiny)) continue;
            if (y < window.top) window.top = y;
            window.bottom = y + 1;
            if (x < window.left) window.left = x;
            if (x >= window.right) window.right = x + 1;
        }
    }
    return window;
}

}  // namespace

void mean_field(const View& images, const View& start, const View& boxes, int64_t iterations, double factor, double low,
                double high, double least, double most, double epsilon, const View& words, int threads) {
    const int64_t B = boxes.size[0], h = boxes.size[1], w = boxes.size[2], n = words_for(h * w);
    if (B == 0 || h * w == 0) return;
    const Numbers numbers{iterations,
                          static_cast<float>(factor),
                          static_cast<float>(low),
                          static_cast<float>(high),
                          static_cast<float>(least),
                          static_cast<float>(most),
                          static_cast<float>(epsilon)};
    const int64_t workers = B < threads ? B : threads, floats = Crop::floats_for(h, w), flags = 2 * Crop::flags_for(h, w);
    Scratch memory;
    float* planes = memory.take<float>(workers, floats);
    uint8_t* moved = memory.take<uint8_t>(workers, flags);
    parallel_for(B, 1, static_cast<int>(workers), [&](int64_t begin, int64_t end, int worker) {
        for (int64_t b = begin; b < end; ++b) {
            uint32_t* out = words.as<uint32_t>() + b * n;
            for (int64_t i = 0; i < n; ++i) out[i] = 0;
            const Window window = find_window(boxes, b, planes + worker * floats);
            if (window.height() <= 0) continue;
            const Crop crop(planes + worker * floats, moved + worker * flags, window);
            fill_weights(images, b, window, numbers, crop);
            fill_state(start, boxes, b, window, numbers, crop);
            const int last = iterate(window, numbers, crop);
            write_bits(window, w, crop.z[last], crop.line, out);
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
