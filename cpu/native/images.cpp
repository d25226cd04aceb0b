// Image files → samples: decode what the crop needs, resize with antialiasing, mirror, colour jitter, into a batch uint8 (N, H, W, 3).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "baseline.hpp"
#include "draws.hpp"
#include "jitter.hpp"
#include "jpeg.hpp"
#include "resample.hpp"

namespace py = pybind11;
using namespace images;

namespace {

constexpr size_t KEEP = 32 << 20;          // bytes of working memory that a thread keeps between images
constexpr long LARGEST_PLANE = 1 << 22;    // pixels of a crop that is decoded whole before it is resized

struct Look {  // what becomes of the picture
    std::array<double, 4> crop;  // ltrb, shares of the picture
    bool flip;
    std::array<int, 4> order;
    std::array<double, 4> amounts;
    bool jitter;
};

struct Work {  // a thread's memory
    std::vector<uint8_t> file, ring, band, columns, picture;
    std::vector<const uint8_t*> rows;
    Taps across, down, chroma_across, chroma_down;
    Baseline baseline;
    void trim() {
        for (auto* buffer : {&file, &ring, &band, &columns, &picture})
            if (buffer->capacity() > KEEP) std::vector<uint8_t>().swap(*buffer);
        baseline.trim(KEEP);
    }
};

template <class T>
T* sized(std::vector<T>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

struct Crop {  // in pixels, as PIL's crop of the reference
    int left, top, right, bottom;
};

Crop crop_of(const Look& look, int width, int height) {
    auto edge = [](double share, int side) { return std::min(std::max(int(share * side), 0), side); };
    Crop crop = {edge(look.crop[0], width), edge(look.crop[1], height), edge(look.crop[2], width), edge(look.crop[3], height)};
    crop.left = std::min(crop.left, width - 1), crop.top = std::min(crop.top, height - 1);
    crop.right = std::max(crop.right, crop.left + 1), crop.bottom = std::max(crop.bottom, crop.top + 1);
    return crop;
}

// The sample as it is made: in bands of LANES rows, band → column → channel → row (resample.hpp).
struct Picture {
    uint8_t* pixels;
    int height, width;
    long groups;

    Picture(Work& work, int height, int width) : height(height), width(width), groups(long((height + LANES - 1) / LANES) * width) {
        pixels = sized(work.picture, size_t(groups) * 3 * LANES);
    }
    uint8_t* band(int number) const { return pixels + size_t(number) * width * 3 * LANES; }

    // Jitters it as asked for and writes it as rows.
    void finish(const Look& look, uint8_t* out) const {
        if (look.jitter) jitter(pixels, groups, long(height) * width, look.order.data(), look.amounts.data(), 4);
        for (int y = 0; y < height; y += LANES)
            transpose(out + size_t(y) * width * 3, size_t(width) * 3, band(y / LANES), LANES, width * 3, std::min(LANES, height - y));
    }
};

// Resizes CHANNELS interleaved channels of a source into those of a picture from `channel` on. row(y) gives a source row's
// pixel at column across.begin; rows are asked for in rising order, and must stay valid as long as a later output row needs them.
template <int CHANNELS, class Row>
void resize(Work& work, const Picture& picture, int channel, const Taps& across, const Taps& down, bool flip, Row&& row) {
    const int bytes = (across.end - across.begin) * CHANNELS;
    const size_t pitch = (size_t(bytes) + 63) & ~size_t(63);
    sized(work.band, pitch * LANES);
    sized(work.columns, size_t(bytes) * LANES);
    work.rows.resize(size_t(down.taps));
    for (int y = 0; y < picture.height; ++y) {
        for (int k = 0; k < down.count[y]; ++k) work.rows[k] = row(down.first[y] + k);
        uint8_t* target = work.band.data() + size_t(y % LANES) * pitch;
        if (down.count[y] == 1)
            memcpy(target, work.rows[0], size_t(bytes));
        else
            blend_rows(target, work.rows.data(), &down.weights[size_t(y) * down.taps], down.count[y], bytes);
        const int rows = y % LANES + 1;
        if (rows < LANES && y + 1 < picture.height) continue;
        if (rows < LANES) memset(work.band.data() + size_t(rows) * pitch, 0, size_t(LANES - rows) * pitch);
        transpose(work.columns.data(), LANES, work.band.data(), pitch, LANES, bytes);
        const auto blend_columns = CHANNELS == 3 ? blend_columns_of_3 : blend_columns_of_1;
        blend_columns(picture.band(y / LANES) + channel * LANES, work.columns.data(), across, across.begin, picture.width, flip);
    }
}

bool aspect_fits(long width, long height, long recorded_width, long recorded_height) {
    return std::labs(width * recorded_height - height * recorded_width) < std::max({recorded_width, recorded_height, width, height});
}

// How many eighths of full size are enough. Scales between these have no vector code in libjpeg-turbo and take longer than the full size.
int eighths_for(const Crop& crop, int height, int width) {
    int eighths = 8;
    while (eighths > 1 && (crop.right - crop.left) * long(eighths) / 16 >= width && (crop.bottom - crop.top) * long(eighths) / 16 >= height) eighths /= 2;
    return eighths;
}

// How many times less finely the colours would be decoded than the rest: libjpeg makes up only for what is stored less finely both ways.
int lopsided(const jpeg_decompress_struct& info) {
    int most = 1;
    for (int i = 0; i < info.num_components; ++i) {
        const auto& one = info.comp_info[i];
        const int across = info.max_h_samp_factor / one.h_samp_factor, down = info.max_v_samp_factor / one.v_samp_factor;
        most = std::max(most, std::max(across, down) / std::min(across, down));
    }
    return most;
}

// By baseline.hpp → false if the file is not for it, or is too large to be decoded into planes, or at full size.
bool render_plain(Work& work, const uint8_t* data, size_t size, int recorded_height, int recorded_width, const Look& look, uint8_t* out, int height,
                  int width) {
    Baseline& file = work.baseline;
    if (!file.open(data, size)) return false;
    if (recorded_width > 0 && !aspect_fits(file.width, file.height, recorded_width, recorded_height)) return false;
    const Crop crop = crop_of(look, file.width, file.height);
    if (long(crop.right - crop.left) * (crop.bottom - crop.top) > LARGEST_PLANE || eighths_for(crop, height, width) < 8) return false;
    if (!work.across.prepare(crop.left, crop.right, width) || !work.down.prepare(crop.top, crop.bottom, height)) return false;
    if (!file.decode(crop.left, crop.top, crop.right, crop.bottom)) return false;
    const Picture picture(work, height, width);
    for (int i = 0; i < file.parts; ++i) {
        const Plane& plane = file.planes[i];
        if (i == 1) {
            work.chroma_across.prepare(crop.left, crop.right, width, plane.halved_x, plane.width);
            work.chroma_down.prepare(crop.top, crop.bottom, height, plane.halved_y, plane.height);
        }
        const Taps &across = i ? work.chroma_across : work.across, &down = i ? work.chroma_down : work.down;
        resize<1>(work, picture, i, across, down, look.flip,
                  [&](int y) { return plane.pixels + size_t(y - plane.top) * plane.pitch + (across.begin - plane.left); });
    }
    for (long g = 0; file.parts == 1 && g < picture.groups; ++g)
        for (int c = 1; c < 3; ++c) memcpy(picture.pixels + (3 * g + c) * LANES, picture.pixels + 3 * g * LANES, LANES);
    if (file.parts == 3) {
        to_rgb(picture.pixels, picture.groups);
        if (const int rows = height % LANES)  // what is outside the picture stays 0
            for (int at = 0; at < 3 * width; ++at) memset(picture.band(height / LANES) + at * LANES + rows, 0, size_t(LANES - rows));
    }
    picture.finish(look, out);
    return true;
}

// → eighths of full size at which it was decoded; -Status if it was not.
int render_jpeg(Work& work, const uint8_t* data, size_t size, int recorded_height, int recorded_width, const Look& look, bool exact, uint8_t* out,
                int height, int width) {
    if (!exact && render_plain(work, data, size, recorded_height, recorded_width, look, out, height, width)) return 8;
    Jpeg jpeg;
    if (int status = jpeg.open(data, size)) return -status;
    auto& info = jpeg.info;
    const int full_width = int(info.image_width), full_height = int(info.image_height);
    if (recorded_width > 0 && !aspect_fits(full_width, full_height, recorded_width, recorded_height)) return -UNUSUAL;
    const Crop crop = crop_of(look, full_width, full_height);
    const int eighths = exact ? 8 : std::min(eighths_for(crop, height, width) * lopsided(info), 8);
    info.scale_num = unsigned(eighths), info.scale_denom = 8;
    const double scale = eighths / 8.0;
    if (!work.across.prepare(crop.left * scale, crop.right * scale, width)) return -UNUSUAL;
    if (!work.down.prepare(crop.top * scale, crop.bottom * scale, height)) return -UNUSUAL;

    if (int status = jpeg.guarded([&] { jpeg_start_decompress(&info); })) return -status;
    const Taps &across = work.across, &down = work.down;
    const int decoded_height = int(info.output_height), end = std::min(across.end, int(info.output_width));
    JDIMENSION column = 0, columns = info.output_width;
    if (across.begin > 0 || end < int(info.output_width)) {  // two more on either side: chroma is interpolated from its neighbours
        column = JDIMENSION(std::max(across.begin - 2, 0));
        columns = JDIMENSION(std::min(end + 2, int(info.output_width))) - column;
        if (int status = jpeg.guarded([&] { jpeg_crop_scanline(&info, &column, &columns); })) return -status;
    }
    const size_t pitch = (size_t(columns) * 3 + 127) & ~size_t(63);
    const int slots = down.taps + 32;
    uint8_t* ring = sized(work.ring, pitch * size_t(slots));
    const Picture picture(work, height, width);

    int have = down.first[0], keep = have;  // rows read, and the first that is still needed
    int status = jpeg.guarded([&] {
        if (have > 0) jpeg_skip_scanlines(&info, JDIMENSION(have));
        resize<3>(work, picture, 0, across, down, look.flip, [&](int y) {
            if (y > keep + down.taps) keep = y - down.taps;
            while (have <= y && have < decoded_height) {
                JSAMPROW lines[16];
                const int room = std::min({16, keep + slots - have, decoded_height - have});
                for (int i = 0; i < room; ++i) lines[i] = ring + size_t((have + i) % slots) * pitch;
                const int read = int(jpeg_read_scanlines(&info, lines, JDIMENSION(room)));
                if (read <= 0) jpeg.give_up();
                have += read;
            }
            return ring + size_t(std::min(y, decoded_height - 1) % slots) * pitch + size_t(across.begin - int(column)) * 3;
        });
    });
    if (status) return -status;
    picture.finish(look, out);
    return eighths;
}

// → false if it takes more source pixels for one than the resizer knows.
bool render_rows(Work& work, const uint8_t* pixels, int source_height, int source_width, const Look& look, uint8_t* out, int height, int width) {
    const Crop crop = crop_of(look, source_width, source_height);
    if (!work.across.prepare(crop.left, crop.right, width) || !work.down.prepare(crop.top, crop.bottom, height)) return false;
    const Picture picture(work, height, width);
    resize<3>(work, picture, 0, work.across, work.down, look.flip, [&](int y) { return pixels + (size_t(y) * source_width + work.across.begin) * 3; });
    picture.finish(look, out);
    return true;
}

Work& work_of_thread() {
    thread_local Work work;
    return work;
}

// The file's bytes in work.file; 0 if it is not a file that can be read.
size_t read_file(Work& work, const std::string& path) {
    if (path.find('\0') != std::string::npos) return 0;
    const int file = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return 0;
    struct stat about;
    size_t size = 0;
    if (fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0 && about.st_size < (1 << 30)) {
        const size_t all = size_t(about.st_size);
        try {
            sized(work.file, all);
        } catch (...) {
            close(file);
            throw;
        }
        while (size < all) {
            const ssize_t got = read(file, work.file.data() + size, all - size);
            if (got <= 0) break;
            size += size_t(got);
        }
        if (size < all) size = 0;
    }
    close(file);
    return size;
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

struct Target {
    uint8_t* pixels;
    int height, width;
};

Target target_of(Bytes& batch, py::ssize_t row) {
    if (batch.ndim() != 4 || batch.shape(3) != 3 || row < 0 || row >= batch.shape(0)) throw py::value_error("a batch is uint8 (N, H, W, 3), and the row one of N");
    if (batch.shape(1) < 1 || batch.shape(2) < 1 || batch.shape(1) > 32768 || batch.shape(2) > 32768) throw py::value_error("a sample has 1 to 32,768 pixels a side");
    return {batch.mutable_data(row), int(batch.shape(1)), int(batch.shape(2))};
}

Look look_of(const Sample* sample) {
    Look look = {{0, 0, 1, 1}, false, {0, 1, 2, 3}, {1, 1, 1, 0}, sample != nullptr};
    if (sample) {
        look.crop = {sample->crop.left, sample->crop.top, sample->crop.right, sample->crop.bottom};
        look.flip = sample->flip;
        std::copy(sample->order, sample->order + 4, look.order.begin());
        std::copy(sample->amounts, sample->amounts + 4, look.amounts.begin());
    }
    return look;
}

int render(const uint8_t* data, size_t size, const Look& look, bool exact, const Target& target, std::pair<int, int> recorded) {
    Work& work = work_of_thread();
    const int result = render_jpeg(work, data, size, recorded.first, recorded.second, look, exact, target.pixels, target.height, target.width);
    work.trim();
    return result;
}

// → what render() gives for each, `exact` where there is no sample.
std::vector<int> render_files(const std::vector<std::string>& paths, Bytes batch, const std::vector<const Sample*>& samples,
                              const std::vector<std::pair<int, int>>& recorded) {
    const size_t count = paths.size();
    if (samples.size() != count || recorded.size() != count || batch.ndim() != 4 || size_t(batch.shape(0)) != count)
        throw py::value_error("there must be as many samples, sizes and rows of the batch as files");
    std::vector<Target> targets;
    for (size_t i = 0; i < count; ++i) targets.push_back(target_of(batch, py::ssize_t(i)));
    std::vector<int> done(count);
    py::gil_scoped_release release;
    Work& work = work_of_thread();
    for (size_t i = 0; i < count; ++i) {
        const size_t size = read_file(work, paths[i]);
        done[i] = size == 0 ? -UNUSUAL : render(work.file.data(), size, look_of(samples[i]), samples[i] == nullptr, targets[i], recorded[i]);
    }
    return done;
}

int render_bytes(const py::bytes& data, Bytes batch, py::ssize_t row, const Sample* sample, std::pair<int, int> recorded, bool exact) {
    const Target target = target_of(batch, row);
    const Look look = look_of(sample);
    char* content;
    py::ssize_t size;
    if (PyBytes_AsStringAndSize(data.ptr(), &content, &size)) throw py::error_already_set();
    py::gil_scoped_release release;
    return render(reinterpret_cast<const uint8_t*>(content), size_t(size), look, exact, target, recorded);
}

bool render_array(Bytes pixels, Bytes batch, py::ssize_t row, const Sample* sample) {
    const Target target = target_of(batch, row);
    if (pixels.ndim() != 3 || pixels.shape(2) != 3 || pixels.shape(0) < 1 || pixels.shape(1) < 1 || pixels.shape(0) * pixels.shape(1) > MAX_PIXELS)
        throw py::value_error("pixels are uint8 (height, width, 3)");
    const Look look = look_of(sample);
    const uint8_t* source = pixels.data();
    const int height = int(pixels.shape(0)), width = int(pixels.shape(1));
    py::gil_scoped_release release;
    Work& work = work_of_thread();
    const bool done = render_rows(work, source, height, width, look, target.pixels, target.height, target.width);
    work.trim();
    return done;
}

Sample draw(const py::object& generator, const Floats& boxes, int tries, const Rules& rules) {
    const py::capsule stream = generator.attr("bit_generator").attr("capsule");  // does not keep its generator alive
    if (std::string(stream.name() ? stream.name() : "") != "BitGenerator") throw py::value_error("generator is numpy.random.Generator");
    if (boxes.ndim() != 2 || boxes.shape(1) != 4) throw py::value_error("boxes are (M, 4)");
    if (tries < 1) throw py::value_error("a rule is tried once or more");
    std::vector<Box> given(size_t(boxes.shape(0)));
    for (size_t i = 0; i < given.size(); ++i) {
        const float* edges = boxes.data() + 4 * i;
        given[i] = {edges[0], edges[1], edges[2], edges[3]};
    }
    Sample sample;
    draw_sample(*stream.get_pointer<BitStream>(), rules, given, tries, sample);
    return sample;
}

}  // namespace

PYBIND11_MODULE(_images, m) {
    m.doc() = "Image files to samples; see cpu/loader.py.";
    m.attr("TOO_MANY_SCANS") = -TOO_MANY_SCANS;
    m.attr("MAX_SCANS") = MAX_SCANS;
    py::class_<Rules>(m, "Rules", "The constants that samples are drawn with; low and high of brightness, contrast, saturation, hue.")
        .def(py::init([](std::vector<double> minimum_ious, double flip_probability, std::array<double, 4> low, std::array<double, 4> high) {
                 Rules rules{std::move(minimum_ious), flip_probability, {}, {}};
                 std::copy(low.begin(), low.end(), rules.low);
                 std::copy(high.begin(), high.end(), rules.high);
                 return rules;
             }),
             py::arg("minimum_ious"), py::arg("flip_probability"), py::arg("low"), py::arg("high"));
    py::class_<Sample>(m, "Sample", "What was drawn for a sample, and the boxes that remain.")
        .def(py::init([](std::array<double, 4> crop, bool flip, std::array<int, 4> order, std::array<double, 4> amounts) {
                 Sample sample;
                 sample.crop = {crop[0], crop[1], crop[2], crop[3]};
                 sample.flip = flip;
                 for (int change : order)
                     if (change < 0 || change > 3) throw py::value_error("changes are numbered 0 to 3");
                 for (double edge : crop)
                     if (!(edge >= 0 && edge <= 2)) throw py::value_error("a crop lies in [0, 1]");
                 for (double amount : amounts)
                     if (!(std::abs(amount) <= 1000)) throw py::value_error("an amount is a small number");
                 std::copy(order.begin(), order.end(), sample.order);
                 std::copy(amounts.begin(), amounts.end(), sample.amounts);
                 return sample;
             }),
             py::arg("crop"), py::arg("flip"), py::arg("order"), py::arg("amounts"))
        .def_property_readonly("crop", [](const Sample& s) { return std::array<double, 4>{s.crop.left, s.crop.top, s.crop.right, s.crop.bottom}; })
        .def_readonly("flip", &Sample::flip)
        .def_property_readonly("order", [](const Sample& s) { return std::array<int, 4>{s.order[0], s.order[1], s.order[2], s.order[3]}; })
        .def_property_readonly("amounts", [](const Sample& s) { return std::array<double, 4>{s.amounts[0], s.amounts[1], s.amounts[2], s.amounts[3]}; })
        .def_property_readonly("kept", [](const Sample& s) { return py::array_t<int>(py::ssize_t(s.kept.size()), s.kept.data()); })
        .def_property_readonly("boxes", [](const Sample& s) { return py::array_t<float>({py::ssize_t(s.kept.size()), py::ssize_t(4)}, s.boxes.data()); });
    m.def("draw", &draw, py::arg("generator"), py::arg("boxes"), py::arg("tries"), py::arg("rules"),
          "Draws a sample with a numpy.random.Generator, as the reference's augment does.");
    const char* about =
        "Renders a JPEG file into row `row` of a batch uint8 (N, H, W, 3): as `sample` says, or only resized (None). `recorded` is (height, width), "
        "0 if unknown.\n\n→ the eighths of its size at which it was decoded (8 if `exact`); below 0: TOO_MANY_SCANS, or damaged or unusual.";
    m.def("render_files", &render_files, py::arg("paths"), py::arg("batch").noconvert(), py::arg("samples"), py::arg("recorded"),
          "Renders N files into the N rows of a batch, `exact` where there is no sample → what render_bytes gives, for each.");
    m.def("render_bytes", &render_bytes, py::arg("data"), py::arg("batch").noconvert(), py::arg("row"), py::arg("sample").none(true),
          py::arg("recorded") = std::pair<int, int>(0, 0), py::arg("exact") = false, about);
    m.def("render_array", &render_array, py::arg("pixels").noconvert(), py::arg("batch").noconvert(), py::arg("row"), py::arg("sample").none(true),
          "The same of pixels uint8 (height, width, 3); False if they are too large for it.");
}
