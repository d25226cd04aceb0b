// Plain JPEG files (baseline, Huffman-coded, YCbCr or grey) to planes, at the resolution in which each is stored.
//
// A crop needs the entropy decoding of all blocks above its last row, and of nothing else more than its own blocks. Upsampling
// of chroma and the change to RGB are left to the resize, which does them on far fewer pixels. Whatever is not as plain as
// most photographs are, or is damaged, is refused here and left to libjpeg. Format: ITU-T T.81.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exif.hpp"

namespace images {

constexpr int LOOK = 11;         // bits looked up at once; hardly any code is longer, and often two symbols are in them
constexpr int DUMMY = 64;        // where a coefficient beyond the last is put
constexpr int END = 128;         // or more: the number of the coefficient after the last, where a block says that it ends
constexpr int MOST_DC = 11, MOST_AC = 10;  // bits of a value: with codes of 16, two symbols fit into the 56 of a refill
constexpr int PADDING = 256;     // zeros after the scan: more than the 63 · 26 bits of a block

// From a coefficient's number in the file to its place in a block stored by columns, so that one transpose does in the inverse DCT.
struct Order {
    uint8_t place[END + 64];
    Order() {
        std::fill(std::begin(place), std::end(place), uint8_t(DUMMY));
        int row = 0, column = 0;
        for (int i = 0; i < 64; ++i) {
            place[i] = uint8_t(column * 8 + row);
            const bool up = (row + column) % 2 == 0;
            const bool at_edge = up ? row == 0 || column == 7 : column == 0 || row == 7;
            if (!at_edge) row += up ? -1 : 1, column += up ? 1 : -1;
            else if (up ? column < 7 : row == 7) ++column;
            else ++row;
        }
    }
};
inline const Order ORDER;

// The value that so many bits mean (T.81, F.2.2.1): the smaller half of their numbers are those below 0.
constexpr int HALF[MOST_DC + 1] = {0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
constexpr int BELOW[MOST_DC + 1] = {0, -1, -3, -7, -15, -31, -63, -127, -255, -511, -1023, -2047};
inline int value_of(int raw, int bits) { return raw + ((raw - HALF[bits]) >> 31 & BELOW[bits]); }  // no branch: signs cannot be foretold

struct Huffman {
    // What the next LOOK bits begin with: a symbol (a code, and the bits of a value) and, if it is in them as a whole, the one after it.
    struct alignas(8) Entry {
        uint8_t used;         // bits of both
        uint8_t first_used;   // of the first; 0 if its code is longer than LOOK, or none
        uint8_t first_start;  // 64 - first_used: where its value's bits begin in the next 64, from the bottom
        uint8_t first_bits;   // of its value; with first_start what the instruction BEXTR takes
        uint8_t first_step;   // to the coefficient after it
        uint8_t second_step;  // 0 if there is none
        int16_t second_value;
    };
    Entry entries[1 << LOOK];

    // From a DHT segment: 16 counts, then the symbols. Nothing is done if it is the same as before. False if it is impossible.
    bool build(const uint8_t* given, int symbols, bool of_dc) {
        if (size == 16 + symbols && dc == of_dc && memcmp(spec, given, size_t(size)) == 0) return true;
        size = 0, dc = of_dc;
        memset(entries, 0, sizeof entries);
        uint32_t code = 0;
        int number = 0;
        for (int length = 1; length <= 16; ++length, code <<= 1) {
            first[length] = number - int(code);
            for (int n = 0; n < given[length - 1]; ++n, ++number, ++code) {
                const int symbol = given[16 + number];
                if (code >= 1u << length || (dc ? symbol > MOST_DC : (symbol & 15) > MOST_AC)) return false;
                if (length > LOOK) continue;
                const int rest = LOOK - length;
                std::fill_n(entries + (code << rest), 1 << rest, entry_of(symbol, length));
            }
            after[length] = code << (16 - length);
        }
        size = 16 + symbols;
        memcpy(spec, given, size_t(size));
        if (!dc) pair();
        return true;
    }

    // The entry of a code longer than LOOK bits at the top of `next`; `first_used` is 0 if there is none.
    Entry long_entry(uint64_t next) const {
        const uint32_t top = uint32_t(next >> 48);
        int length = LOOK + 1;
        while (length <= 16 && top >= after[length]) ++length;
        return length > 16 ? Entry{} : entry_of(spec[16 + first[length] + int(top >> (16 - length))], length);
    }

private:
    uint8_t spec[16 + 256];
    int size = 0, first[17];  // symbol = first[length] + code
    uint32_t after[17];       // the code after the last of this length, as 16 bits
    bool dc = false;

    Entry entry_of(int symbol, int length) const {
        const int bits = symbol & 15, run = dc ? 0 : symbol >> 4;
        const bool ends = !dc && bits == 0 && run != 15;
        const auto used = uint8_t(length + bits);
        return {used, used, uint8_t(64 - used), uint8_t(bits), uint8_t(ends ? END - 1 : run + 1), 0, 0};
    }
    void pair() {
        for (uint32_t i = 0; i < 1u << LOOK; ++i) {
            Entry& entry = entries[i];
            if (entry.first_used == 0 || entry.first_used >= LOOK || entry.first_step == END - 1) continue;
            const Entry& second = entries[(i << entry.first_used) & ((1u << LOOK) - 1)];
            const int left = LOOK - entry.first_used - second.first_used;
            if (second.first_used == 0 || left < 0) continue;
            entry.used = uint8_t(LOOK - left);
            entry.second_step = second.first_step;
            entry.second_value = int16_t(value_of((i >> left) & ((1u << second.first_bits) - 1), second.first_bits));
        }
    }
};

// One component of a scan, and where its part of the picture goes.
struct Part {
    int across, down;  // blocks in a group
    const Huffman *dc, *ac;
    const float* scales;
    uint8_t* pixels;
    size_t pitch;
};

// Groups of blocks: all up to `rows` are decoded, those from first_row on in first_column…last_column become pixels.
struct Scan {
    const uint8_t *begin, *end;  // without stuffing, PADDING zeros behind it
    int columns, rows, first_column, last_column, first_row, parts;
    Part part[3];
};

}  // namespace images

#define KERNELS "scan_kernels.hpp"
#include "targets.hpp"

namespace images {

struct Plane {  // the part of a component that was decoded
    const uint8_t* pixels;
    size_t pitch;
    int left, top;           // of the component's pixels, that of pixels[0]
    int width, height;       // of the whole component
    bool halved_x, halved_y;  // it has every second of the picture's pixels
};

class Baseline {
public:
    int width = 0, height = 0, parts = 0;
    Plane planes[3];

    // Reads the header; false if the file is not plain.
    bool open(const uint8_t* data, size_t size);

    // Decodes what the picture's pixels left…right, top…bottom are made of, a chroma pixel more on each side; false if damaged.
    bool decode(int left, int top, int right, int bottom);

    // Gives back what it holds beyond `most` bytes.
    void trim(size_t most) {
        for (auto* buffer : {&pixels, &scan})
            if (buffer->capacity() > most) std::vector<uint8_t>().swap(*buffer);
    }

private:
    struct Component {
        int across, down, quantiser, dc, ac;  // sampling factors, numbers of tables
    };
    Component components[3];
    Huffman tables[2][4];  // DC, AC
    bool defined[2][4], quantised[4];
    uint8_t quantisers[4][64];
    alignas(64) float scales[4][64];  // in the order of a block, with those of the inverse DCT
    std::vector<uint8_t> pixels, scan;
    const uint8_t *data = nullptr, *end = nullptr;

    bool frame(const uint8_t* about, int size);
    bool huffman(const uint8_t* about, int size);
    bool quantiser(const uint8_t* about, int size);
    bool start(const uint8_t* about, int size);
    size_t unstuff();
};

inline bool Baseline::open(const uint8_t* file, size_t size) {
    if (size < 4 || file[0] != 0xFF || file[1] != 0xD8 || file[size - 2] != 0xFF || file[size - 1] != 0xD9) return false;
    end = file + size - 2;
    memset(defined, 0, sizeof defined);
    memset(quantised, 0, sizeof quantised);
    parts = 0;
    bool jfif = false, exif = false;
    for (const uint8_t* at = file + 2; end - at >= 4;) {
        const int marker = at[0] << 8 | at[1], length = at[2] << 8 | at[3], rest = length - 2;
        const uint8_t* content = at + 4;
        if (length < 2 || end - at - 2 < length) return false;
        at += 2 + length;
        if (marker == 0xFFC0) {
            if (!frame(content, rest)) return false;
        } else if (marker == 0xFFC4) {
            if (!huffman(content, rest)) return false;
        } else if (marker == 0xFFDB) {
            if (!quantiser(content, rest)) return false;
        } else if (marker == 0xFFE0) {
            jfif |= rest >= 14 && memcmp(content, "JFIF", 5) == 0;
        } else if (marker == 0xFFE1) {
            const bool another = rest >= 6 && memcmp(content, "Exif\0", 6) == 0;
            if (exif_orientation(content, size_t(rest)) != 1 || (exif && another)) return false;
            exif |= another;
        } else if (marker == 0xFFDA) {
            data = at;
            return (parts == 1 || jfif) && start(content, rest);  // without JFIF's word it may be no YCbCr
        } else if ((marker < 0xFFE2 || marker > 0xFFEF) && marker != 0xFFFE) {  // other processes, restart intervals
            return false;
        }
    }
    return false;
}

inline bool Baseline::frame(const uint8_t* about, int size) {
    if (parts || size < 6 || about[0] != 8 || (about[5] != 1 && about[5] != 3) || size != 6 + 3 * about[5]) return false;
    height = about[1] << 8 | about[2], width = about[3] << 8 | about[4], parts = about[5];
    for (int i = 0; i < parts; ++i) {
        const uint8_t* one = about + 6 + 3 * i;
        components[i] = {one[1] >> 4, one[1] & 15, one[2], 0, 0};
        if (parts == 1) components[i].across = components[i].down = 1;  // alone, its blocks have no groups
        const int most = i == 0 ? 2 : 1;
        if (one[0] != i + 1 || one[2] > 3 || components[i].across < 1 || components[i].across > most || components[i].down < 1 || components[i].down > most)
            return false;
    }
    return width > 4 && height > 4;  // libjpeg upsamples narrower ones in another way
}

inline bool Baseline::huffman(const uint8_t* about, int size) {
    while (size >= 17) {
        const int kind = about[0] >> 4, number = about[0] & 15;
        int symbols = 0;
        for (int i = 1; i <= 16; ++i) symbols += about[i];
        if (kind > 1 || number > 3 || symbols > 256 || size < 17 + symbols || !tables[kind][number].build(about + 1, symbols, kind == 0)) return false;
        defined[kind][number] = true;
        about += 17 + symbols, size -= 17 + symbols;
    }
    return size == 0;
}

inline bool Baseline::quantiser(const uint8_t* about, int size) {
    for (; size >= 65; about += 65, size -= 65) {
        if (about[0] > 3) return false;  // also those of 16 bits
        memcpy(quantisers[about[0]], about + 1, 64);
        quantised[about[0]] = true;
    }
    return size == 0;
}

inline bool Baseline::start(const uint8_t* about, int size) {
    if (parts == 0 || size != 4 + 2 * parts || about[0] != parts) return false;
    for (int i = 0; i < parts; ++i) {
        const int name = about[1 + 2 * i], dc = about[2 + 2 * i] >> 4, ac = about[2 + 2 * i] & 15;
        if (name != i + 1 || dc > 3 || ac > 3 || !defined[0][dc] || !defined[1][ac] || !quantised[components[i].quantiser]) return false;
        components[i].dc = dc, components[i].ac = ac;
    }
    const uint8_t* rest = about + 1 + 2 * parts;
    if (rest[0] != 0 || rest[1] != 63 || rest[2] != 0) return false;
    static constexpr double AAN[8] = {1.0, 1.387039845, 1.306562965, 1.175875602, 1.0, 0.785694958, 0.541196100, 0.275899379};
    for (int q = 0; q < 4; ++q)
        for (int i = 0; i < 64 && quantised[q]; ++i) {
            const int place = ORDER.place[i];
            scales[q][place] = float(quantisers[q][i] * AAN[place / 8] * AAN[place % 8] / 8);
        }
    return true;
}

// Copies the scan without the zeros that follow each 0xFF in it → its size, or 0 if a marker stands in it.
inline size_t Baseline::unstuff() {
    if (scan.size() < size_t(end - data) + PADDING) scan.resize(size_t(end - data) + PADDING);
    uint8_t* to = scan.data();
    for (const uint8_t* at = data; at < end;) {
        const auto* found = static_cast<const uint8_t*>(memchr(at, 0xFF, size_t(end - at)));
        const uint8_t* stop = found ? found + 1 : end;
        memcpy(to, at, size_t(stop - at));
        to += stop - at;
        if (found && *stop != 0) return 0;  // at the very end stands the first byte of the end marker
        at = found ? stop + 1 : end;
    }
    memset(to, 0, PADDING);
    return size_t(to - scan.data());
}

inline bool Baseline::decode(int left, int top, int right, int bottom) {
    const int wide = 8 * components[0].across, tall = 8 * components[0].down;  // a group of blocks, in pixels
    Scan given;
    given.parts = parts;
    given.columns = (width + wide - 1) / wide;
    given.first_column = std::max(left - components[0].across, 0) / wide, given.first_row = std::max(top - components[0].down, 0) / tall;
    given.last_column = std::min((right + components[0].across + wide - 1) / wide, given.columns);
    given.rows = std::min((bottom + components[0].down + tall - 1) / tall, (height + tall - 1) / tall);
    size_t size = 0, begin[3] = {};
    for (int i = 0; i < parts; ++i) {
        const Component& component = components[i];
        const int across = 8 * component.across, down = 8 * component.down;
        const bool halved_x = component.across < components[0].across, halved_y = component.down < components[0].down;
        const size_t pitch = size_t(given.last_column - given.first_column) * across;
        planes[i] = {nullptr, pitch, given.first_column * across, given.first_row * down, (width + halved_x) >> halved_x, (height + halved_y) >> halved_y,
                     halved_x, halved_y};
        begin[i] = size;
        size += pitch * size_t(given.rows - given.first_row) * down;
    }
    if (pixels.size() < size) pixels.resize(size);
    for (int i = 0; i < parts; ++i) {
        const Component& component = components[i];
        uint8_t* target = pixels.data() + begin[i];
        planes[i].pixels = target;
        given.part[i] = {component.across,           component.down, &tables[0][component.dc], &tables[1][component.ac],
                         scales[component.quantiser], target,         planes[i].pitch};
    }
    const size_t bytes = unstuff();
    given.begin = scan.data(), given.end = given.begin + bytes;
    return bytes > 0 && PICK(decode_scan)(given);
}

}  // namespace images
