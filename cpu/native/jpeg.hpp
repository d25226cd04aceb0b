// Reading JPEG files with libjpeg-turbo: only the rows and columns asked for, and nothing but whole, plain files.
//
// Whatever is unusual or damaged is left to the caller's other reader (PIL), which then also decides what is refused.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <jpeglib.h>

#include "exif.hpp"

namespace images {

enum Status { READ = 0, UNUSUAL = 1, TOO_MANY_SCANS = 2 };

constexpr long MAX_PIXELS = 178956970;  // PIL's limit
constexpr int MAX_SCANS = 100;          // of a progressive file; encoders write about ten

// One file. Every call into libjpeg goes through guarded(): errors and warnings come back as UNUSUAL.
class Jpeg {
public:
    Jpeg() {
        memset(&info, 0, sizeof info);
        info.err = jpeg_std_error(&errors.base);
        errors.base.error_exit = [](j_common_ptr c) { give_up(c, UNUSUAL); };
        errors.base.emit_message = [](j_common_ptr c, int level) {
            if (level < 0) give_up(c, UNUSUAL);  // a warning: damaged or cut short
        };
        errors.base.output_message = [](j_common_ptr) {};
        watch.progress_monitor = [](j_common_ptr c) {
            if (reinterpret_cast<j_decompress_ptr>(c)->input_scan_number > MAX_SCANS) give_up(c, TOO_MANY_SCANS);
        };
        created = guarded([this] { jpeg_create_decompress(&info); }) == READ;
    }
    ~Jpeg() {
        if (created) jpeg_destroy_decompress(&info);
    }
    Jpeg(const Jpeg&) = delete;
    Jpeg& operator=(const Jpeg&) = delete;

    jpeg_decompress_struct info;

    // `body` must hold nothing that needs a destructor: an error jumps out of it.
    template <class Body>
    int guarded(Body&& body) {
        const int status = setjmp(errors.jump);
        if (status != 0) return status;
        body();
        return READ;
    }

    // Reads up to the first scan. UNUSUAL also for what only the other reader knows: CMYK, an orientation, no end marker.
    int open(const uint8_t* data, size_t size) {
        if (!created || size < 125 || data[0] != 0xFF || data[1] != 0xD8 || data[2] != 0xFF) return UNUSUAL;
        if (data[size - 2] != 0xFF || data[size - 1] != 0xD9) return UNUSUAL;
        const int status = guarded([=] {
            info.progress = &watch;
            jpeg_mem_src(&info, const_cast<unsigned char*>(data), static_cast<unsigned long>(size));
            jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
            jpeg_read_header(&info, TRUE);
        });
        if (status != READ) return status;
        if (info.jpeg_color_space != JCS_GRAYSCALE && info.jpeg_color_space != JCS_YCbCr && info.jpeg_color_space != JCS_RGB) return UNUSUAL;
        if (long(info.image_width) * long(info.image_height) > MAX_PIXELS) return UNUSUAL;
        int exif = 0;
        for (auto marker = info.marker_list; marker != nullptr; marker = marker->next) {
            if (marker->data_length >= 6 && memcmp(marker->data, "Exif\0", 6) == 0 && ++exif > 1) return UNUSUAL;
            if (exif_orientation(marker->data, marker->data_length) != 1) return UNUSUAL;
        }
        info.out_color_space = JCS_RGB;
        info.dct_method = JDCT_ISLOW;
        info.do_fancy_upsampling = TRUE;
        return READ;
    }

    [[noreturn]] void give_up() { give_up(reinterpret_cast<j_common_ptr>(&info), UNUSUAL); }  // only within guarded()

private:
    struct Errors {
        jpeg_error_mgr base;
        jmp_buf jump;
    };
    Errors errors;
    jpeg_progress_mgr watch = {};
    bool created = false;

    [[noreturn]] static void give_up(j_common_ptr c, int status) { longjmp(reinterpret_cast<Errors*>(c->err)->jump, status); }
};

}  // namespace images
