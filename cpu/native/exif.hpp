// The orientation of a photograph, as far as it can be told in a plain way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace images {

// The EXIF orientation that a marker's data tell; 1 if they tell none, 0 if they cannot be told in this plain way.
inline int exif_orientation(const uint8_t* data, size_t size) {
    static const char EXIF[] = "Exif\0";
    if (size < 14 || memcmp(data, EXIF, 6) != 0) {
        static const char WORD[] = "Orientation";  // XMP may tell it too
        for (size_t i = 0; i + sizeof WORD - 1 <= size; ++i)
            if (data[i] == 'O' && memcmp(data + i, WORD, sizeof WORD - 1) == 0) return 0;
        return size >= 6 && memcmp(data, EXIF, 6) == 0 ? 0 : 1;
    }
    data += 6, size -= 6;
    const bool little = data[0] == 'I' && data[1] == 'I', big = data[0] == 'M' && data[1] == 'M';
    if (!little && !big) return 0;
    auto u16 = [&](size_t at) { return little ? data[at] | data[at + 1] << 8 : data[at] << 8 | data[at + 1]; };
    auto u32 = [&](size_t at) { return little ? uint32_t(u16(at)) | uint32_t(u16(at + 2)) << 16 : uint32_t(u16(at)) << 16 | uint32_t(u16(at + 2)); };
    const size_t table = u32(4);
    if (u16(2) != 42 || table > size || size - table < 2) return 0;
    const size_t entries = size_t(u16(table));
    if (entries * 12 > size - table - 2) return 0;
    for (size_t e = 0; e < entries; ++e) {
        const size_t at = table + 2 + e * 12;
        if (u16(at) == 0x0112) return u16(at + 2) == 3 && u32(at + 4) == 1 ? u16(at + 8) : 0;
    }
    return 1;
}

}  // namespace images
