// One block per crop runs all iterations, with a barrier after each. The state and the weights lie in scratch memory, which is
// small enough for the L2 cache; two states take turns. A warp computes pieces of rows, of 32 pixels. It computes a piece only
// if a pixel in it or beside it changed in the last iteration: else it would get the numbers that it has.
#include "mean_field/mean_field.h"

#include "common/device.cuh"
#include "common/unfused.h"

namespace sprompt {
namespace cuda {
namespace {

constexpr int most_threads = 1024, planes = 9;
constexpr float tiny = 0x1p-126f;

// A float tensor, read with its strides.
struct Map {
    const void* data;
    DType dtype;
    int64_t stride[4];

    explicit Map(const View& view) : data(view.data), dtype(view.dtype), stride{} {
        for (int i = 0; i < view.rank; ++i) stride[i] = view.stride[i];
    }
    __device__ float at(int64_t offset) const {
        if (dtype == DType::f32) return static_cast<const float*>(data)[offset];
        if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(data)[offset]);
        return to_float(static_cast<const f16*>(data)[offset]);
    }
};

struct Numbers {
    int64_t iterations;
    float factor, low, high, least, most, epsilon;
};

// Planes with a border of one pixel, in rows of w + 2. Weights are 0 in the border.
struct Crop {
    int h, w, line, size, pieces, flags;
    float *east, *south, *south_east, *south_west;  // weights of a pixel and its neighbour there
    float* log_t;                                   // minus infinity outside the box
    float *z[2], *p[2];                             // states, p = softplus(z)
    uint8_t* moved[2];                              // (h + 2, pieces + 2) pieces that the last iteration changed

    __device__ Crop(unsigned char* scratch, int h, int w)
        : h(h), w(w), line(w + 2), size((h + 2) * (w + 2)), pieces((w + warp - 1) / warp), flags((h + 2) * (pieces + 2)) {
        float* floats = reinterpret_cast<float*>(scratch);
        const auto take = [&]() { return floats += size, floats - size; };
        east = take();
        south = take();
        south_east = take();
        south_west = take();
        log_t = take();
        z[0] = take();
        z[1] = take();
        p[0] = take();
        p[1] = take();
        moved[0] = reinterpret_cast<uint8_t*>(floats);
        moved[1] = moved[0] + flags;
    }
};

// The weight of pixel (y, x) with the pixel (y + down, x + right).
__device__ inline float weight(const Map& images, int64_t b, const Crop& crop, int y, int x, int down, int right,
                               float factor) {
    const int v = y + down, u = x + right;
    if (v >= crop.h || u < 0 || u >= crop.w) return 0.0f;
    float squares[3];
    for (int c = 0; c < 3; ++c) {
        const int64_t plane = b * images.stride[0] + c * images.stride[1];
        const float d = images.at(plane + y * images.stride[2] + x * images.stride[3]) -
                        images.at(plane + v * images.stride[2] + u * images.stride[3]);
        squares[c] = d * d;
    }
    const float found = Exact::exp(((squares[0] + squares[1]) + squares[2]) * factor);
    return found == found ? found : 0.0f;
}

// A u at a pixel. Sums are in an order that flips and transposition do not change.
__device__ inline float sums(const Crop& crop, const float* u, int at) {
    const int above = at - crop.line, below = at + crop.line;
    const float across = crop.east[at] * u[at + 1] + crop.east[at - 1] * u[at - 1];
    const float along = crop.south[at] * u[below] + crop.south[above] * u[above];
    const float falling = crop.south_east[at] * u[below + 1] + crop.south_east[above - 1] * u[above - 1];
    const float rising = crop.south_west[at] * u[below - 1] + crop.south_west[above + 1] * u[above + 1];
    return (u[at] + (across + along)) + (falling + rising);
}

__device__ inline float limited(float x, float least, float most) {
    x = x > least ? x : least;
    return x < most ? x : most;
}

__global__ void __launch_bounds__(most_threads)
    mean_field_kernel(Map images, Map start, Map boxes, Numbers numbers, int h, int w, int64_t words_each,
                      unsigned char* scratch, int64_t scratch_each,  // (B, scratch_each)
                      uint32_t* words) {                             // (B, words_each)
    const int64_t b = blockIdx.x;
    const Crop crop(scratch + b * scratch_each, h, w);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % warp, own = thread / warp, warps = threads / warp;

    for (int i = thread; i < crop.flags; i += threads) {
        const int row = i / (crop.pieces + 2), piece = i % (crop.pieces + 2);
        crop.moved[0][i] = row > 0 && row <= h && piece > 0 && piece <= crop.pieces;  // the first iteration computes all
        crop.moved[1][i] = 0;
    }
    for (int i = thread; i < crop.size; i += threads) {
        const int y = i / crop.line - 1, x = i % crop.line - 1;
        const bool real = y >= 0 && y < h && x >= 0 && x < w;
        float z = numbers.least, log_t = -__int_as_float(0x7f800000);
        float east = 0.0f, south = 0.0f, south_east = 0.0f, south_west = 0.0f;
        if (real) {
            east = weight(images, b, crop, y, x, 0, 1, numbers.factor);
            south = weight(images, b, crop, y, x, 1, 0, numbers.factor);
            south_east = weight(images, b, crop, y, x, 1, 1, numbers.factor);
            south_west = weight(images, b, crop, y, x, 1, -1, numbers.factor);
            const float t = boxes.at(b * boxes.stride[0] + y * boxes.stride[1] + x * boxes.stride[2]);
            if (t >= tiny) {
                log_t = Exact::log(t);
                float q = start.at(b * start.stride[0] + y * start.stride[1] + x * start.stride[2]) * t;
                q = limited(q, numbers.low, numbers.high);
                z = limited(Exact::log(q / (1.0f - q)), numbers.least, numbers.most);
            }
        }
        crop.east[i] = east;
        crop.south[i] = south;
        crop.south_east[i] = south_east;
        crop.south_west[i] = south_west;
        crop.log_t[i] = log_t;
        crop.z[0][i] = crop.z[1][i] = z;
        crop.p[0][i] = crop.p[1][i] = Exact::softplus(z);
    }
    __syncthreads();

    int from = 0;
    for (int64_t iteration = 0; iteration < numbers.iterations; ++iteration) {
        const uint8_t* before = from == 0 ? crop.moved[0] : crop.moved[1];
        uint8_t* now = from == 0 ? crop.moved[1] : crop.moved[0];
        const float *z = from == 0 ? crop.z[0] : crop.z[1], *p = from == 0 ? crop.p[0] : crop.p[1];
        float *next_z = from == 0 ? crop.z[1] : crop.z[0], *next_p = from == 0 ? crop.p[1] : crop.p[0];
        bool any = false;
        for (int i = own; i < h * crop.pieces; i += warps) {
            const int y = i / crop.pieces, piece = i % crop.pieces, x = piece * warp + lane;
            const int corner = y * (crop.pieces + 2) + piece;  // of the 3 x 3 pieces in and beside this one
            const bool beside = lane < 9 && before[corner + lane / 3 * (crop.pieces + 2) + lane % 3] != 0;
            bool changed = false;
            if (__any_sync(whole_warp, beside) && x < w) {
                const int at = (y + 1) * crop.line + x + 1;
                const float raised = Exact::softplus(sums(crop, p, at) + numbers.epsilon);
                const float next = limited((crop.log_t[at] + sums(crop, z, at)) - raised, numbers.least, numbers.most);
                changed = next != z[at];
                next_z[at] = next;
                next_p[at] = Exact::softplus(next);
            }
            changed = __any_sync(whole_warp, changed);
            if (lane == 0) now[corner + crop.pieces + 3] = changed;
            any |= changed;
        }
        from = 1 - from;
        if (!__syncthreads_or(any)) break;
    }

    const float* z = from == 0 ? crop.z[0] : crop.z[1];
    for (int64_t word = own; word < words_each; word += warps) {
        const int64_t pixel = word * warp + lane;
        bool set = false;
        if (pixel < static_cast<int64_t>(h) * w)
            set = z[(static_cast<int>(pixel) / w + 1) * crop.line + static_cast<int>(pixel) % w + 1] > 0.0f;
        const unsigned bits = __ballot_sync(whole_warp, set);
        if (lane == 0) words[b * words_each + word] = bits;
    }
}

}  // namespace

void mean_field(const Stream& stream, const View& images, const View& start, const View& boxes, int64_t iterations,
                double factor, double low, double high, double least, double most, double epsilon, const View& words,
                const View& scratch) {
    const int64_t B = boxes.size[0], h = boxes.size[1], w = boxes.size[2], pieces = h * tiles(w, warp);
    const int64_t size = (h + 2) * (w + 2), flags = (h + 2) * (tiles(w, warp) + 2);
    if (scratch.size[1] < planes * 4 * size + 2 * flags || scratch.size[1] % 4 != 0)
        throw Failure("mean_field: too little scratch");
    const Numbers numbers{iterations,
                          static_cast<float>(factor),
                          static_cast<float>(low),
                          static_cast<float>(high),
                          static_cast<float>(least),
                          static_cast<float>(most),
                          static_cast<float>(epsilon)};
    const int threads = static_cast<int>(pieces < most_threads / warp ? pieces * warp : most_threads);
    launch(stream, mean_field_kernel, h * w > 0 ? B : 0, threads, 0, Map(images), Map(start), Map(boxes), numbers,
           static_cast<int>(h), static_cast<int>(w), words.size[1], scratch.as<unsigned char>(), scratch.size[1],
           words.as<uint32_t>());
}

}  // namespace cuda
}  // namespace sprompt
